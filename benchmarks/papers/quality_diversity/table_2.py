"""Table 2: seven corruptions of the test images."""

from benchmarks.papers.bench import Bench
from benchmarks.papers.quality_diversity.subsets import mode
from benchmarks.papers.result import Result
from merging.tasks import AnyTaskSettings

POOLS = ("images",)
CORRUPTIONS = ("motion_blur", "impulse_noise", "gaussian_noise", "pixelate", "spatter", "contrast", "jpeg")
METHOD = "task_arithmetic"


def run(bench: Bench) -> Result:
    """All members beside the DPP's three, on clean and corrupted images; the subset was chosen on clean ones."""
    result = Result()
    chosen = mode(bench, len(bench.members) - 1)
    for corruption in (None, *CORRUPTIONS):
        on = bench if corruption is None else bench.with_tasks(lambda task, c=corruption: _corrupted(task, c))
        whole, part = on.measure(on.default(METHOD)), on.measure(on.default(METHOD, chosen))
        name = (corruption or "clean").replace("_", " ")
        result.add("task arithmetic, all members", name, whole)
        result.add("task arithmetic, DPP", name, part)
        result.compare(f"{name}: the DPP's subset is above all members", part, whole, ("DPP", "all"))
    return result


def _corrupted(task: AnyTaskSettings, corruption: str) -> AnyTaskSettings:
    return task.model_copy(update={"corruption": corruption})
