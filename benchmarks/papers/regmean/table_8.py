"""Table 8: how much of the Grams' off-diagonal entries is kept (ρ), or what is added to their diagonal (β)."""

from benchmarks.papers.bench import Bench
from benchmarks.papers.result import Result
from merging.methods.model_types import T5

POOLS = ("sentiment", "images", "seq2seq")
RHOS = (0.0, 0.1, 0.5, 0.9, 1.0)
BETAS = (0.01, 0.1, 1.0)


def run(bench: Bench) -> Result:
    """RegMean at every ρ without β, and at every β with ρ = 1."""
    result = Result(plot="points", labels=("ρ, or β", "test accuracy, mean over tasks"))
    rho = {value: bench.measure(bench.default("regmean", rho=value)) for value in RHOS}
    with_beta = {value: bench.default("regmean", rho=1.0, beta=value) for value in BETAS}
    beta = {value: bench.measure(recipe) for value, recipe in with_beta.items()}
    for value, measured in rho.items():
        result.add("ρ (β = 0)", value, measured)
    for value, measured in beta.items():
        result.add("β (ρ = 1)", value, measured)
    result.compare("ρ = 0.9 is above the whole Grams (ρ = 1)", rho[0.9], rho[1.0], ("ρ = 0.9", "ρ = 1"))
    result.compare("ρ = 0.9 is above the diagonals alone (ρ = 0)", rho[0.9], rho[0.0], ("ρ = 0.9", "ρ = 0"))
    if bench.weights.model_type in T5:
        claim = "Of T5, ρ = 0.1 is above ρ = 0.9, the value for other models"
        result.compare(claim, rho[0.1], rho[0.9], ("ρ = 0.1", "ρ = 0.9"))
    best = max(beta, key=lambda value: beta[value].mean)
    result.compare(
        "Scaling off-diagonals (ρ = 0.9) is above the best β", rho[0.9], beta[best], ("ρ = 0.9", f"β = {best}")
    )
    validation = {value: bench.measure(recipe, "validation").mean for value, recipe in with_beta.items()}
    best = max(validation, key=lambda value: validation[value])
    result.compare(
        "Control: ρ = 0.9 is above the best β by validation", rho[0.9], beta[best], ("ρ = 0.9", f"β = {best}")
    )
    return result
