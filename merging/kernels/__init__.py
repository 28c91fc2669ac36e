"""Arithmetic on flat tensors that knows no method: in blocks, and by compiled loops on a CPU."""
