"""Make the embedded demo model: train tokenizer and model, plant outlier channels, measure, write.

The demo needs a model that (1) trains on two CPU cores in minutes, (2) solves some but not most of
its problems, so that reinforcement learning has something to do, and (3) loses accuracy in 4 bits
as real language models do. A small Qwen2 trained from scratch on generated word problems gives the
first two. The third it lacks: its activations have no outlier channels, and W4A4 costs it almost
nothing. So some are planted, in a way that leaves the function of the 16-bit model untouched.

**Outlier channels.** Channel c of a linear's input is scaled up by s at its source, and column c
of every linear that reads it is divided by s:

    norm    RMSNorm gain w[c] * s             q, k, v (or gate, up) columns c / s
    value   rows of v_proj and its bias * s   o_proj columns of every query head that shares them
    up      row c of up_proj * s              down_proj column c / s

With s a power of two every product is the same number as before, in any binary float format, and
the logits are equal bit for bit. In MXFP4 they are not: one scale serves a block of 32 channels,
so an outlier pushes its 31 neighbours towards zero, and in the weights the divided column rounds
to zero beside its neighbours. That is what outlier channels do to real models.

**Stopping.** The learning rate is warmed up, held until the greedy accuracy on held-out problems
reaches `--target`, then taken linearly to zero. Accuracy still climbs during the decay.

Run it with no arguments for the committed recipe; see scripts/README.md. With `--norm-blocks 0` it
writes the model without outliers, from which `--plain` makes others in a minute each.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import platform
import random
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from npu_qat.numerics import fake_quant
from npu_qat.tasks import (
    PUBLISHED_SUFFIX,
    Problem,
    ProblemSet,
    accuracy_reward,
    flexible_reward,
    word_problems,
)

PROFILE = "ascend950"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SELECTION_SEED = 1
"""Problems that decide when to stop and what to report; the demo is tested on another seed's."""


MEASURING_FLAGS = [
    "device",
    "plain",
    "report_size",
    "norm_blocks",
    "value_blocks",
    "up_blocks",
    "outlier_exponent",
    "outlier_seed",
]
CONFIG_KEYS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
]


# Tokenizer


def train_tokenizer(problems: Sequence[Problem], vocab_size: int, folder: Path) -> Qwen2Tokenizer:
    """Train Qwen2's own kind of tokenizer on `problems`, write it to `folder`, load it from there.

    Byte-level BPE with single digits, as Qwen2 has it, since every library that sees a Qwen2
    configuration splits text by Qwen2's rule before it looks at the merges. The published prompt
    suffix is one added token, which keeps the prompts short.
    """
    from tokenizers import AddedToken, pre_tokenizers, trainers

    task = ProblemSet("word_problems", problems, [], prompt_suffix="")
    tokenizer = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (
        text
        for problem in problems
        for text in (f"user\n{task.messages(problem)[0]['content']}\nassistant", problem.solution)
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(f" {PUBLISHED_SUFFIX}", normalized=False)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return Qwen2Tokenizer.from_pretrained(folder)


def encode(
    tokenizer: Qwen2Tokenizer, problems: Sequence[Problem]
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts (chat template applied) and of the answers (closed by EOS)."""
    task = ProblemSet("word_problems", problems, [])
    prompts = [
        tokenizer.apply_chat_template(task.messages(p), tokenize=False, add_generation_prompt=True)
        for p in problems
    ]
    answers = [p.solution + tokenizer.eos_token for p in problems]
    return (
        tokenizer(prompts, add_special_tokens=False)["input_ids"],
        tokenizer(answers, add_special_tokens=False)["input_ids"],
    )


# Model and training


def build_model(args: argparse.Namespace, tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """A small Qwen2 in fp32, randomly initialised from the current torch seed."""
    config = Qwen2Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_sliding_window=False,
    )
    return Qwen2ForCausalLM(config)


@dataclass(frozen=True)
class Corpus:
    """Tokenised problems, padded on the right.

    Attributes:
        tokens: [N, T] int16, padded with the pad id.
        weights: [N, T] float16 loss weight of each token as a target: answers 1, questions
            `question_weight`, padding 0.
    """

    tokens: Tensor
    weights: Tensor


def build_corpus(
    tokenizer: Qwen2Tokenizer, problems: Sequence[Problem], question_weight: float
) -> Corpus:
    prompts, answers = encode(tokenizer, problems)
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    tokens = torch.full((len(problems), longest), tokenizer.pad_token_id, dtype=torch.int16)
    weights = torch.zeros(len(problems), longest, dtype=torch.float16)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer, dtype=torch.int16)
        weights[row, : len(prompt)] = question_weight
        weights[row, len(prompt) : end] = 1.0
    return Corpus(tokens, weights)


def batches(corpus: Corpus, size: int, seed: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches, each cut to its longest row."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(corpus.tokens), generator=generator)
        for rows in order.split(size):
            if len(rows) < size:
                break
            weights = corpus.weights[rows]
            length = int((weights > 0).any(0).nonzero().max()) + 1
            yield (
                corpus.tokens[rows, :length].to(device).long(),
                weights[:, :length].to(device).float(),
            )


def weighted_loss(model: Qwen2ForCausalLM, tokens: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy of next tokens; padding is on the right, so no mask is needed."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        logits = model(tokens[:, :-1], use_cache=False).logits
    losses = functional.cross_entropy(
        logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    targets = weights[:, 1:].flatten()
    return (losses * targets).sum() / targets.sum()


def pretrain(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    args: argparse.Namespace,
    log: Callable[[dict[str, Any]], None],
) -> int:
    """Train to `--target` and through the decay; returns the number of steps."""
    problems = word_problems.generate("train", args.pool, args.train_levels, args.seed)
    corpus = build_corpus(tokenizer, problems, args.question_weight)
    held_out = word_problems.generate("test", args.eval_size, args.levels, SELECTION_SEED)
    decay = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decay, "weight_decay": args.weight_decay},
            {"params": plain, "weight_decay": 0},
        ],
        lr=args.lr,
        betas=(0.9, 0.98),
        fused=args.device == "cuda",
    )
    losses: list[float] = []
    start, decay_from, tokens_seen = time.time(), None, 0
    for step, (tokens, weights) in enumerate(
        batches(corpus, args.batch, args.seed, args.device), start=1
    ):
        progress = 0.0 if decay_from is None else (step - decay_from) / args.decay_steps
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, step / args.warmup) * max(0.0, 1.0 - progress)
        loss = weighted_loss(model, tokens, weights)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        tokens_seen += tokens.numel()
        finished = progress >= 1.0 or step == args.max_steps
        if step % args.eval_every == 0 or finished:
            model.eval()
            texts = complete(model, tokenizer, held_out)
            accuracy = sum(map(accuracy_reward, texts, held_out)) / len(held_out)
            model.train()
            log(
                {
                    "step": step,
                    "loss": round(sum(losses) / len(losses), 5),
                    "lr": optimizer.param_groups[0]["lr"],
                    "accuracy": round(accuracy, 4),
                    "tokens": tokens_seen,
                    "seconds": round(time.time() - start, 1),
                }
            )
            losses.clear()
            if decay_from is None and accuracy >= args.target:
                decay_from = step
        if finished:
            return step
    raise AssertionError("batches are endless")


# Generation and scores


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Qwen2Tokenizer,
    problems: Sequence[Problem],
    samples: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 64,
    batch: int = 2048,
) -> list[str]:
    """Completions, `samples` a problem in a row; greedy at temperature 0."""
    prompts, _ = encode(tokenizer, problems)
    rows = [ids for ids in prompts for _ in range(samples)]
    texts: list[str] = []
    for first in range(0, len(rows), batch):
        padded = tokenizer.pad({"input_ids": rows[first : first + batch]}, return_tensors="pt")
        padded = padded.to(model.device)
        output = model.generate(
            input_ids=padded["input_ids"],
            attention_mask=padded["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
        )
        new = output[:, padded["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson interval of a proportion."""
    p = successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def proportion(hits: Sequence[float]) -> dict[str, float]:
    low, high = wilson(sum(hits), len(hits))
    return {
        "mean": round(sum(hits) / len(hits), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "n": len(hits),
    }


def greedy_scores(
    model: nn.Module, tokenizer: Qwen2Tokenizer, problems: Sequence[Problem]
) -> dict[str, Any]:
    """Strict accuracy, all and by level, and flexible accuracy, of greedy completions."""
    texts = complete(model, tokenizer, problems)
    strict = [accuracy_reward(t, p) for t, p in zip(texts, problems, strict=True)]
    by_level = {
        str(level): proportion(
            [s for s, p in zip(strict, problems, strict=True) if p.level == level]
        )
        for level in sorted({p.level for p in problems})
    }
    flexible = [flexible_reward(t, p) for t, p in zip(texts, problems, strict=True)]
    return {"strict": proportion(strict), "flexible": proportion(flexible), "by_level": by_level}


def sampling_scores(
    model: nn.Module,
    tokenizer: Qwen2Tokenizer,
    problems: Sequence[Problem],
    group: int = 8,
) -> dict[str, float]:
    """At temperature 1: mean accuracy, pass@group, and how many groups have mixed rewards."""
    torch.manual_seed(SELECTION_SEED)
    texts = complete(model, tokenizer, problems, samples=group, temperature=1.0)
    repeated = [p for p in problems for _ in range(group)]
    rewards = torch.tensor([accuracy_reward(t, p) for t, p in zip(texts, repeated, strict=True)])
    right = rewards.view(-1, group).sum(1)
    return {
        "mean": round(rewards.mean().item(), 4),
        f"pass@{group}": round((right > 0).float().mean().item(), 4),
        "mixed_groups": round(((right > 0) & (right < group)).float().mean().item(), 4),
        "problems": len(problems),
    }


# Quantised evaluation


class QuantizedForTest(nn.Module):
    """A linear whose weight, and if asked whose input, is rounded to `PROFILE` along the input."""

    def __init__(self, linear: nn.Linear, activations: bool) -> None:
        super().__init__()
        self.weight = fake_quant(linear.weight.detach(), PROFILE)
        self.bias = linear.bias
        self.activations = activations

    def forward(self, x: Tensor) -> Tensor:
        if self.activations:
            x = fake_quant(x, PROFILE)
        return functional.linear(x, self.weight, self.bias)


def quantized_copy(model: Qwen2ForCausalLM, activations: bool) -> Qwen2ForCausalLM:
    """A copy of `model` with every linear of its decoder layers quantised (not the tied head)."""
    twin = copy.deepcopy(model)
    for layer in twin.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, QuantizedForTest(child, activations))
    return twin


# Outlier channels


def spread_channels(width: int, blocks: int, rng: random.Random, block_size: int = 32) -> list[int]:
    """One random channel in each of `blocks` randomly chosen blocks of a vector."""
    chosen = sorted(rng.sample(range(width // block_size), blocks))
    return [block * block_size + rng.randrange(block_size) for block in chosen]


@torch.no_grad()
def scale_norm(layer: Any, site: str, channels: Sequence[int], factor: float) -> None:
    """Scale gains of a layer's RMSNorm and divide the columns that read them."""
    if site == "input_layernorm":
        readers = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    else:
        readers = [layer.mlp.gate_proj, layer.mlp.up_proj]
    getattr(layer, site).weight[list(channels)] *= factor
    for linear in readers:
        linear.weight[:, list(channels)] /= factor


@torch.no_grad()
def scale_value(layer: Any, channels: Sequence[int], factor: float) -> None:
    """Scale rows of v_proj and divide the o_proj columns of every query head that reads them."""
    attention = layer.self_attn
    attention.v_proj.weight[list(channels)] *= factor
    attention.v_proj.bias[list(channels)] *= factor
    size, groups = attention.head_dim, attention.num_key_value_groups
    for channel in channels:
        head, offset = divmod(channel, size)
        for query_head in range(head * groups, (head + 1) * groups):
            attention.o_proj.weight[:, query_head * size + offset] /= factor


@torch.no_grad()
def scale_up(layer: Any, channels: Sequence[int], factor: float) -> None:
    """Scale rows of up_proj and divide the columns of down_proj that read them."""
    layer.mlp.up_proj.weight[list(channels)] *= factor
    layer.mlp.down_proj.weight[:, list(channels)] /= factor


def apply_outliers(model: Qwen2ForCausalLM, outliers: Sequence[dict[str, Any]]) -> None:
    """Scale as listed; a list with inverted factors undoes it exactly."""
    for entry in outliers:
        layer = model.model.layers[entry["layer"]]
        channels, factor = entry["channels"], entry["factor"]
        if entry["site"] == "value":
            scale_value(layer, channels, factor)
        elif entry["site"] == "up":
            scale_up(layer, channels, factor)
        else:
            scale_norm(layer, entry["site"], channels, factor)


def choose_outliers(config: Qwen2Config, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Which channels to scale: the same hidden channels in every layer, as real models have them.

    Inner channels (values, feed-forward) mean something else in each layer and are drawn anew.
    """
    rng = random.Random(f"outliers, {args.outlier_seed}")
    factor = float(2**args.outlier_exponent)
    hidden = spread_channels(config.hidden_size, args.norm_blocks, rng)
    value_width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    outliers: list[dict[str, Any]] = []
    for layer in range(config.num_hidden_layers):
        values = spread_channels(value_width, args.value_blocks, rng)
        ups = spread_channels(config.intermediate_size, args.up_blocks, rng)
        for site, channels in (
            ("input_layernorm", hidden),
            ("post_attention_layernorm", hidden),
            ("value", values),
            ("up", ups),
        ):
            if channels:
                outliers.append(
                    {"layer": layer, "site": site, "channels": channels, "factor": factor}
                )
    return outliers


@torch.no_grad()
def check_same_function(before: Qwen2ForCausalLM, after: Qwen2ForCausalLM, vocab: int) -> None:
    """Raise unless the bf16 logits of both models are equal bit for bit on random tokens."""
    tokens = torch.randint(3, vocab, (16, 48), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(before.device)
    if not torch.equal(before(tokens).logits, after(tokens).logits):
        raise ValueError("the outlier channels changed the 16-bit logits: they must not")


# The whole job


def measure(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, args: argparse.Namespace
) -> dict[str, Any]:
    """Scores of the bf16 model and of its W4A16 and W4A4 copies on held-out problems."""
    levels = [*args.levels, *(level for level in word_problems.LEVELS if level not in args.levels)]
    problems = word_problems.generate("test", args.report_size, args.levels, SELECTION_SEED)
    extra = [
        problem
        for level in levels[len(args.levels) :]
        for problem in word_problems.generate("test", 400, [level], SELECTION_SEED)
    ]
    sampled = problems[:400]
    scores: dict[str, Any] = {}
    for name, candidate in (
        ("bf16", model),
        ("w4a16", quantized_copy(model, activations=False)),
        ("w4a4", quantized_copy(model, activations=True)),
    ):
        scores[name] = greedy_scores(candidate, tokenizer, problems)
        if extra:
            beyond = greedy_scores(candidate, tokenizer, extra)["by_level"]
            scores[name]["beyond_demo_levels"] = beyond
        if name != "w4a16":
            scores[name]["sampling"] = sampling_scores(candidate, tokenizer, sampled)
    return scores


def write_model(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    record: dict[str, Any],
    log_lines: Sequence[dict[str, Any]],
    out: Path,
) -> None:
    """Write the model folder: weights, tokenizer, log, card, checksums."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config.update(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model.save_pretrained(out)
    (out / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = "".join(json.dumps(line) + "\n" for line in log_lines)
    (out / "training_log.jsonl").write_text(lines)
    (out / "README.md").write_text(model_card(record))
    for file in out.iterdir():
        file.chmod(0o644)
    names = sorted(p.name for p in out.iterdir() if p.is_file() and p.name != "SHA256SUMS")
    sums = [f"{hashlib.sha256((out / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (out / "SHA256SUMS").write_text("".join(sums))


def percent(score: dict[str, float]) -> str:
    return f"{100 * score['mean']:.1f} ({100 * score['low']:.1f} to {100 * score['high']:.1f})"


def reflow(text: str) -> str:
    """Fill each paragraph to 100 columns; headings, tables, code and front matter stay."""
    kept = ("---", "#", "|", "    ")
    blocks = text.split("\n\n")
    filled = [b if b.startswith(kept) else textwrap.fill(b, 100) for b in blocks]
    return "\n\n".join(filled).rstrip() + "\n"


def model_card(record: dict[str, Any]) -> str:
    """The README of the model folder, from the record of the run."""
    config, scores, flags = record["config"], record["scores"], record["flags"]
    arms = {"bf16": "BF16", "w4a16": "W4A16 MXFP4", "w4a4": "W4A4 MXFP4"}
    levels = [*scores["bf16"]["by_level"], *scores["bf16"].get("beyond_demo_levels", {})]
    header = " | ".join(f"level {level}" for level in levels)
    rows = []
    for key, label in arms.items():
        by_level = {**scores[key]["by_level"], **scores[key].get("beyond_demo_levels", {})}
        cells = " | ".join(percent(by_level[level]) for level in levels)
        rows.append(f"| {label} | {percent(scores[key]['strict'])} | {cells} |")
    counts = {**scores["bf16"]["by_level"], **scores["bf16"].get("beyond_demo_levels", {})}
    sizes = " | ".join(str(counts[level]["n"]) for level in levels)
    sampling = "\n".join(
        f"| {arms[key]} | {100 * s['mean']:.1f} | {100 * s['pass@8']:.1f} "
        f"| {100 * s['mixed_groups']:.1f} |"
        for key in ("bf16", "w4a4")
        for s in [scores[key]["sampling"]]
    )
    outliers = "\n".join(
        f"| {o['layer']} | {o['site']} | {', '.join(map(str, o['channels']))} | {o['factor']:g} |"
        for o in record["outliers"]
    )
    demo_levels = ", ".join(map(str, flags["levels"]))
    return reflow(f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [arithmetic, mxfp4, quantization-aware-training]
---

# npu-qat demo model

A Qwen2 of {record["parameters"] / 1e6:.2f} million parameters that half-solves generated arithmetic
word problems. It exists so that `npu-qat train` has something to quantise, train and measure in
minutes on a machine with no network. It is of no other use.

## Architecture

Qwen2 (RMSNorm, rotary positions, grouped-query attention with biases on q, k and v, SwiGLU),
{config["num_hidden_layers"]} layers, hidden size {config["hidden_size"]}, feed-forward
{config["intermediate_size"]}, {config["num_attention_heads"]} query and
{config["num_key_value_heads"]} key-value heads, tied embeddings, vocabulary
{config["vocab_size"]}, bf16. Tokenizer: Qwen2's kind (byte-level BPE, a digit is always a token of
its own) trained on the same problems, ChatML template; the published prompt suffix is one token.

## Training

`scripts/pretrain_demo.py` of the npu-qat repository, run as

    {record["command"]}

on {record["machine"]}. Data: {flags["pool"]} problems of levels
{", ".join(map(str, flags["train_levels"]))} from `npu_qat.tasks.word_problems`, train split, seed
{flags["seed"]}. {record["steps"]} steps of {flags["batch"]} problems, AdamW, learning rate
{flags["lr"]}, held until the held-out accuracy reached {100 * flags["target"]:.0f} %, then taken to
zero over {flags["decay_steps"]} steps; loss on answers, weight {flags["question_weight"]} on
questions. `training_log.jsonl` has the curve, `pretraining.json` every number of this card.

## Accuracy

Greedy, strict `#### N` form, percent with 95 % Wilson interval, held-out problems (test split, seed
{SELECTION_SEED}; the demo tests on another's). "All" is levels {demo_levels} in equal parts.
Quantised: profile `{PROFILE}`, every linear of the decoder layers, not the tied embedding and head.

| | all | {header} |
|---|---|{"---|" * len(levels)}
{chr(10).join(rows)}
| n | {scores["bf16"]["strict"]["n"]} | {sizes} |

At temperature 1, groups of 8, {scores["bf16"]["sampling"]["problems"]} problems, percent:

| | mean | pass@8 | groups with mixed rewards |
|---|---|---|---|
{sampling}

## Outlier channels

Real language models have a few channels whose activations are many times larger than the others,
and a block of 32 that holds one loses its other 31 channels in 4 bits. A model trained from scratch
on such problems has none. So these channels were scaled up by the factor below and the columns that
read them divided by it (`value`: rows of v_proj; `up`: rows of up_proj). Factors are powers of two,
so the 16-bit logits are equal bit for bit before and after, which the script checks. Before, W4A4
solved {percent(record["w4a4_before_outliers"])} % of the same problems.

| layer | site | channels | factor |
|---|---|---|---|
{outliers}

## Limitations

Knows about twenty sentence patterns, and no English beyond them; wrong in about half of its
answers, by design. The size of its W4A4 loss was chosen by the strength of the outliers and says
nothing about any real model.

Licence: Apache-2.0.
""")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train and write the npu-qat demo model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("demo_model"), help="folder to write")
    parser.add_argument(
        "--plain",
        type=Path,
        help="skip training: take a model that this script wrote with no outliers",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and shuffling")
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2, 3], help="scored levels")
    parser.add_argument("--train-levels", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--vocab", type=int, default=576)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--ffn", type=int, default=384)
    parser.add_argument("--pool", type=int, default=120_000, help="training problems")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--question-weight", type=float, default=0.1)
    parser.add_argument("--target", type=float, default=0.4, help="accuracy that starts the decay")
    parser.add_argument("--decay-steps", type=int, default=30)
    parser.add_argument("--max-steps", type=int, default=3000)
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--eval-size", type=int, default=300)
    parser.add_argument("--report-size", type=int, default=3000)
    parser.add_argument("--norm-blocks", type=int, default=1, help="outlier channels a norm")
    parser.add_argument("--value-blocks", type=int, default=0)
    parser.add_argument("--up-blocks", type=int, default=0)
    parser.add_argument("--outlier-exponent", type=int, default=4, help="factor is 2 to this")
    parser.add_argument("--outlier-seed", type=int, default=0)
    return parser.parse_args(argv)


def machine() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return f"one {name}" if torch.cuda.is_available() else f"a CPU ({name})"


def command_line(args: argparse.Namespace) -> str:
    """The flags that differ from the defaults, as typed (without --out)."""
    defaults = parse_args([])
    words = ["python scripts/pretrain_demo.py"]
    for key, value in vars(args).items():
        if key not in {"out", "plain"} and value != getattr(defaults, key):
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            words.append(f"--{key.replace('_', '-')} {text}")
    return " ".join(words)


def train(
    args: argparse.Namespace,
) -> tuple[Qwen2ForCausalLM, Qwen2Tokenizer, dict[str, Any], list[dict[str, Any]]]:
    """Tokenizer and bf16 model without outliers, facts of the training, log lines."""
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    sample = word_problems.generate("train", 20_000, args.train_levels, args.seed)
    tokenizer = train_tokenizer(sample, args.vocab, args.out)
    model = build_model(args, tokenizer).to(args.device)
    lines: list[dict[str, Any]] = []

    def log(line: dict[str, Any]) -> None:
        lines.append(line)
        print(json.dumps(line), flush=True)

    model.train()
    steps = pretrain(model, tokenizer, args, log)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    training = {"machine": machine(), "versions": versions, "steps": steps}
    return model.to(torch.bfloat16).eval(), tokenizer, training, lines


def read_plain(
    args: argparse.Namespace,
) -> tuple[Qwen2ForCausalLM, Qwen2Tokenizer, dict[str, Any], list[dict[str, Any]]]:
    """A model that an earlier run wrote with no outliers; its training flags replace `args`'."""
    import shutil

    history = json.loads((args.plain / "pretraining.json").read_text())
    if history["outliers"]:
        raise SystemExit(f"--plain {args.plain}: that model has outlier channels already")
    for key, value in history["flags"].items():
        if key not in MEASURING_FLAGS:
            setattr(args, key, value)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(args.plain / name, args.out)
    model = Qwen2ForCausalLM.from_pretrained(args.plain, dtype=torch.bfloat16)
    log = (args.plain / "training_log.jsonl").read_text().splitlines()
    training = {key: history[key] for key in ("machine", "versions", "steps")}
    tokenizer = Qwen2Tokenizer.from_pretrained(args.out)
    return model.to(args.device).eval(), tokenizer, training, list(map(json.loads, log))


def finish(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    training: dict[str, Any],
    lines: Sequence[dict[str, Any]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Plant the outliers, check, measure and write; returns the record."""
    problems = word_problems.generate("test", args.report_size, args.levels, SELECTION_SEED)
    before = greedy_scores(quantized_copy(model, activations=True), tokenizer, problems)
    outliers = choose_outliers(model.config, args)
    scaled = copy.deepcopy(model)
    apply_outliers(scaled, outliers)
    check_same_function(model, scaled, args.vocab)
    record = {
        "command": command_line(args),
        **training,
        "flags": {k: v for k, v in vars(args).items() if k not in {"out", "plain"}},
        "parameters": sum(p.numel() for p in model.parameters()),
        "config": {key: getattr(model.config, key) for key in CONFIG_KEYS},
        "outliers": outliers,
        "w4a4_before_outliers": before["strict"],
        "scores": measure(scaled, tokenizer, args),
    }
    write_model(scaled, tokenizer, record, lines, args.out)
    return record


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    model, tokenizer, training, lines = read_plain(args) if args.plain else train(args)
    record = finish(model, tokenizer, training, lines, args)
    print(json.dumps(record["scores"], indent=1))


if __name__ == "__main__":
    main()
