import pytest
import torch

from merging.errors import MethodError, TaskError
from merging.faults import is_fault
from merging.statistics.capture import per_example
from merging.statistics.capture.per_example import PerExample
from merging.tasks.task import Batch

CUDA = "CUDA error: an illegal memory access was encountered"


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (RuntimeError(CUDA), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (ModuleNotFoundError("No module named 'judge'"), True),
        (ConnectionResetError("judge.example"), True),
        (caused(TaskError("task 'x': judge:score failed: RuntimeError"), RuntimeError(CUDA)), True),
        (MethodError("α cancel the denominator"), False),
        (caused(TaskError("task 'x': judge:score failed: ValueError"), ValueError("empty")), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (torch.linalg.LinAlgError("linalg.cholesky: the input is not positive-definite"), False),
    ],
)
def test_an_error_is_about_the_machine_or_about_the_recipe(error, fault):
    assert is_fault(error) is fault


class Odd(torch.nn.Module):
    """A layer whose per-example gradients have no short rule."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(4))
        self.out = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.out(x * self.w)


def test_memory_that_runs_out_is_not_taken_for_a_model_that_cannot_be_batched(monkeypatch):
    def full(function):
        def run(*arguments):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        return run

    monkeypatch.setattr(per_example, "vmap", full)
    model = Odd().eval()
    batch = Batch({"x": torch.randn(8, 4)}, torch.randint(0, 3, (8,)), torch.arange(8))
    recorded = PerExample(model, lambda model, batch: model(**batch.inputs))
    with recorded as examples, pytest.raises(torch.OutOfMemoryError):
        examples.forward(batch)  # checks its own sums on the first batch
