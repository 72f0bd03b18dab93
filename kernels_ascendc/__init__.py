"""AscendC kernels for Ascend A2 and A3, their builds and the count of their work; see README.md."""
