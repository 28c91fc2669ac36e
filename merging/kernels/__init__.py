"""Arithmetic on flat tensors that knows no method: in blocks, by compiled loops on a CPU, by kernels on a GPU."""
