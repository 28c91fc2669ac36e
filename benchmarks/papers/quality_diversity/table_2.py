"""Table 2: seven corruptions of the test images."""

from typing import get_args

import numpy as np

from benchmarks.papers.bench import Bench, Measured, averaged
from benchmarks.papers.quality_diversity.subsets import METHODS, drawn, mode
from benchmarks.papers.result import Result
from merging.errors import SettingsError
from merging.tasks import AnyTaskSettings
from merging.tasks.vision.image_classification import Corruption

POOLS = ("images",)
DROP = "mean drop from clean images, points"
KINDS = ("all members", "DPP", "random")


def run(bench: Bench) -> Result:
    """The process's subset of all but one beside random ones and all members; it was chosen on clean validation images."""
    result = Result(
        note="A random subset's scores are the mean over all subsets of its size. Claims are of the mean over the seven "
        "corruptions, of the same images."
    )
    k = len(bench.members) - 1
    chosen, subsets = mode(bench, k), drawn(bench, k)
    results: dict[tuple[str, str], list[Measured]] = {}
    for corruption in (None, *get_args(Corruption)):
        on = bench if corruption is None else bench.with_tasks(lambda task, c=corruption: _corrupted(task, c))
        for method in METHODS:
            scores = {Y: on.measure(on.default(method, Y)) for Y in dict.fromkeys([chosen, *subsets])}
            rows = on.measure(on.default(method)), scores[chosen], averaged([scores[Y] for Y in subsets])
            for kind, measured in zip(KINDS, rows, strict=True):
                name = method.replace("_", " ")
                own = results.setdefault((name, kind), [])
                own.append(measured)
                result.add(f"{name}, {kind}", _words(corruption), measured)
                if corruption is not None:
                    drop = 100 * (own[0].mean - measured.mean)
                    result.row(f"{name}, {kind}", _words(corruption), drop, quantity=DROP)
    for method in METHODS:
        _compare(result, method.replace("_", " "), {kind: results[method.replace("_", " "), kind] for kind in KINDS})
    return result


def _compare(result: Result, name: str, results: dict[str, list[Measured]]) -> None:
    corrupted = {kind: averaged(own[1:]) for kind, own in results.items()}
    drops = {kind: _less(results[kind][0], own) for kind, own in corrupted.items()}
    for kind, measured in drops.items():
        result.row(f"{name}, {kind}", "all seven", 100 * measured.mean, 100 * measured.error, quantity=DROP)
    for other, words in (("random", "random subsets"), ("all members", "all members")):
        claim = f"{name}, corrupted images: the DPP's subset is above {words}"
        result.compare(claim, corrupted["DPP"], corrupted[other], ("DPP", other))
        claim = f"{name}, corrupted images: the DPP's subset loses less of its clean score than {words}"
        result.compare(claim, drops[other], drops["DPP"], (f"{other} loses", "DPP loses"))


def _less(clean: Measured, corrupted: Measured) -> Measured:
    """Example by example, how much is lost."""
    return Measured({task: np.asarray(values - corrupted.values[task]) for task, values in clean.values.items()})


def _words(corruption: str | None) -> str:
    return (corruption or "clean").replace("_", " ")


def _corrupted(task: AnyTaskSettings, corruption: str) -> AnyTaskSettings:
    if task.kind != "image_classification":
        raise SettingsError(f"a task of kind '{task.kind}' has no images to corrupt")
    return task.model_copy(update={"corruption": corruption})
