"""What 4 bits cost, measured against 16 bits in the same run on the same machine.

A millisecond says little about a machine that nobody else has. So each row stands beside a
baseline: a fake-quantiser beside ``torch.clone`` of the same tensor (read once, write once: nothing
that returns a new tensor is faster), a quantised linear beside the frozen 16-bit ``nn.Linear``, a
training step beside 16-bit LoRA as PEFT makes it, decoding beside the 16-bit model. The two are
measured alternately, so that whatever else the machine does meets both, and the ratio of their
medians is the result. The baseline gets the same loop, the same inputs and the same CUDA graphs.
"""
