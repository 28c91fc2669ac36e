"""Removal of a task: a negative factor takes it out; what does that cost the others?"""

from benchmarks.papers.bench import Bench, Measured, averaged, together
from benchmarks.papers.gradient_matching.candidates import known, scaled
from benchmarks.papers.result import Result
from merging.methods import METHODS
from merging.recipe import Recipe

POOLS = ("continued",)
FACTORS = (-0.5, -1.0)
"""Of the member that is taken out."""


def run(bench: Bench) -> Result:
    """Each member in turn is taken from the base; its own domain should lose, the others should not."""
    result = Result(
        note="The members learnt one task in several domains, so taking one out costs all of them. Where gradient matching's "
        "H₀ + Σ α H is not above 0 it is raised to δ, which the program does only where it is asked to (`clamp`)."
    )
    for method in known(bench):
        for factor in FACTORS:
            own, others, after = [], [], {}
            for member in bench.members:
                whole = scaled(bench, method, 1.0)
                clamped = {"clamp": True} if "clamp" in METHODS[whole.method].parameters else {}
                after[member] = bench.measure(Recipe(whole.method, {member: factor}, {**whole.parameters, **clamped}))
                own.append(after[member].on([bench.own(member)]))
                others.append(after[member].on([task for task in bench.tasks if task != bench.own(member)]))
            result.add(f"{method}, own domain", factor, together(own))
            result.add(f"{method}, others", factor, together(others))
            _compare(result, f"{method} at {factor}", bench, together(own), together(others))
            result.compare(
                f"{method} at {factor}, control: a domain loses more by its own removal than by another's",
                _by_domain({member: [after[other] for other in after if other != member] for member in after}, bench),
                _by_domain({member: [measured] for member, measured in after.items()}, bench),
                ("another removed", "itself removed"),
            )
    return result


def _by_domain(after: dict[str, list[Measured]], bench: Bench) -> Measured:
    """Each member's own domain, the mean over some models."""
    return Measured({bench.own(m): averaged(models).values[bench.own(m)] for m, models in after.items()})


def _compare(result: Result, name: str, bench: Bench, own: Measured, others: Measured) -> None:
    base = bench.base()
    before = base.on(list(own.values))
    result.compare(f"{name}: the domain that is taken out loses", before, own, ("before", "after"))
    before = base.on(list(others.values))
    result.compare(f"{name}: the others keep what they have", others, before, ("after", "before"))
