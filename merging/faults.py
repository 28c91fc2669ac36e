"""Which errors tell of a machine and which of a recipe: the former say nothing of the candidate that met them."""

import re

import torch

DEVICE = re.compile(
    r"CUDA error|CUDA driver|cuDNN|CUDNN_STATUS|CUBLAS_STATUS|CUSOLVER_STATUS|NCCL|HIP error|AcceleratorError|"
    r"out of memory|OutOfMemoryError|can't allocate memory|device-side assert"
)
"""What messages about a broken or full device have in common; torch raises most of them as a bare `RuntimeError`."""
MACHINE = (ImportError, OSError, MemoryError, torch.OutOfMemoryError)


def is_fault(error: BaseException) -> bool:
    """Whether an error, or one that it came from, is about the machine: its devices, memory, files or installation."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, MACHINE):
            return True
        if isinstance(current, RuntimeError) and tells_of_device(f"{type(current).__name__}: {current}"):
            return True
        current = current.__cause__
    return False


def tells_of_device(message: str) -> bool:
    """Whether a message is one about a broken or full device."""
    return DEVICE.search(message) is not None
