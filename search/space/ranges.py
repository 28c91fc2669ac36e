"""What may be tried for one parameter: a fixed value, a range or a choice, as a campaign file says it."""

import math
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import BaseTrial
from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from merging.recipe import Value

LARGEST = 1e30
"""Of what is tried: its differences and squares stay finite in float64."""
MOST_STEPS = 10**9


class Domain(BaseModel):
    """One value (`0.9`), a list of choices (`[exact, sampled]`), or a range (`{low: 0.1, high: 1.0}`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    value: Value | None = Field(None, description="The only value; in short, the value itself.")
    choices: tuple[Value, ...] | None = Field(None, description="Values to choose among; in short, a list.")
    low: float | None = Field(None, description="Smallest value to try.")
    high: float | None = Field(None, description="Largest value to try.")
    log: bool = Field(False, description="Search on a logarithmic scale.")
    step: float | None = Field(None, gt=0, description="Distance between the values to try; by default any value.")

    @model_validator(mode="before")
    @classmethod
    def _in_short(cls, given: Any) -> Any:
        if isinstance(given, bool | int | float | str):
            return {"value": given}
        return {"choices": given} if isinstance(given, list | tuple) else given

    @model_validator(mode="after")
    def _one_of_three(self) -> "Domain":
        ways = [
            self.value is not None,
            self.choices is not None,
            self.low is not None or self.high is not None,
        ]
        if sum(ways) != 1:
            raise ValueError("give one value, or a list of choices, or a range `{low: …, high: …}`")
        if self.choices is not None and (not self.choices or len(set(self.choices)) < len(self.choices)):
            raise ValueError("choices must be there, and differ from one another")
        if ways[2]:
            if self.low is None or self.high is None or not -math.inf < self.low < self.high < math.inf:
                raise ValueError("a range needs a finite low and a larger, finite high")
            if max(abs(self.low), abs(self.high)) > LARGEST:
                raise ValueError(f"a range lies within ±{LARGEST:g}")
            if self.step is not None and (self.high - self.low) / self.step > MOST_STEPS:
                raise ValueError(f"a range has at most {MOST_STEPS:,} steps: leave `step` out for any value")
            if self.log and self.low <= 0:
                raise ValueError("a logarithmic range starts above 0")
            if self.log and self.step is not None:
                raise ValueError("a range has `log` or `step`, not both")
        elif self.log or self.step is not None:
            raise ValueError("`log` and `step` belong to a range")
        return self

    @model_serializer
    def _as_given(self) -> Any:
        if self.value is not None:
            return self.value
        if self.choices is not None:
            return list(self.choices)
        limits: dict[str, Any] = {"low": self.low, "high": self.high}
        return limits | ({"log": True} if self.log else {}) | ({"step": self.step} if self.step else {})

    @property
    def values(self) -> tuple[Value, ...]:
        """Every value that is named: the one, the choices, or both ends of the range."""
        if self.value is not None:
            return (self.value,)
        return self.choices if self.choices is not None else self._range

    @property
    def _range(self) -> tuple[float, float]:
        return self.low or 0.0, self.high or 0.0

    def nearest(self, default: Value) -> Value:
        """The default where it lies within, else the nearest value that does (of choices, the first)."""
        if self.low is None:
            return default if default in self.values else self.values[0]
        low, high = self._range
        nearest = min(max(float(default), low), high)
        if self.step is not None:
            nearest = min(low + round((nearest - low) / self.step) * self.step, high)
        return type(default)(nearest) if isinstance(default, int | float) else nearest

    def distribution(self, whole: bool) -> BaseDistribution | None:
        """What Optuna samples from; None where there is nothing to choose.

        Args:
            whole: The parameter takes whole numbers.
        """
        if self.value is not None or (self.choices is not None and len(self.choices) == 1):
            return None
        if self.choices is not None:
            return CategoricalDistribution(self.choices)
        low, high = self._range
        if whole:
            return IntDistribution(round(low), round(high), log=self.log, step=round(self.step or 1))
        return FloatDistribution(low, high, log=self.log, step=self.step)


def suggest(trial: BaseTrial, name: str, distribution: BaseDistribution) -> Any:
    """The trial's value for a parameter."""
    match distribution:
        case CategoricalDistribution():
            return trial.suggest_categorical(name, distribution.choices)
        case IntDistribution():
            return trial.suggest_int(
                name, distribution.low, distribution.high, log=distribution.log, step=distribution.step
            )
        case FloatDistribution():
            return trial.suggest_float(
                name, distribution.low, distribution.high, log=distribution.log, step=distribution.step
            )
    raise TypeError(f"no way to suggest {name} from {type(distribution).__name__}")
