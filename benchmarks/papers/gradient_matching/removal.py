"""Removal of a task: a negative factor takes it out; what does that cost the others?"""

from benchmarks.papers.bench import Bench, Measured
from benchmarks.papers.gradient_matching.candidates import known, scaled
from benchmarks.papers.result import Claim, Result
from merging.errors import MethodError
from merging.recipe import Recipe

POOLS = ("continued",)
FACTORS = (-0.5, -1.0)
"""Of the member that is taken out."""


def run(bench: Bench) -> Result:
    """Each member in turn is taken from the base; its own domain should lose, the others should not."""
    result = Result(note="The members learnt one task in several domains, so taking one out costs all of them.")
    for method in known(bench):
        for factor in FACTORS:
            own, others = [], []
            for member in bench.members:
                whole = scaled(bench, method, 1.0)
                recipe = Recipe(whole.method, {member: factor}, whole.parameters)
                try:
                    found = bench.measure(recipe)
                except MethodError as error:  # H₀ + Σ α H must stay positive
                    result.note += f" {method} at {factor}: {error}."
                    break
                own.append(found.on([bench.own(member)]))
                others.append(found.on([task for task in bench.tasks if task != bench.own(member)]))
            else:
                result.add(f"{method}, own domain", factor, _joined(own))
                result.add(f"{method}, others", factor, _joined(others))
                result.claims.extend(_claims(method, factor, bench, _joined(own), _joined(others)))
    return result


def _claims(method: str, factor: float, bench: Bench, own: Measured, others: Measured) -> list[Claim]:
    base, told = bench.base(), Result()
    rest = {member: [task for task in bench.tasks if task != bench.own(member)] for member in bench.members}
    before = _joined([base.on([bench.own(member)]) for member in bench.members])
    told.compare(f"{method} at {factor}: the domain that is taken out loses", before, own, ("before", "after"))
    before = _joined([base.on(tasks) for tasks in rest.values()])
    told.compare(f"{method} at {factor}: the others keep what they have", others, before, ("after", "before"))
    return told.claims


def _joined(parts: list[Measured]) -> Measured:
    """Several measurements side by side, tasks told apart by number."""
    return Measured({f"{task} {i}": values for i, part in enumerate(parts) for task, values in part.values.items()})
