"""What every merge method must do, as a class of tests."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from merging.errors import MethodError
from merging.methods import METHODS, Context, Prepared, Weight
from merging.recipe import Value
from merging.testing.weights import EXAMPLES, assert_close, complete, identical, make_weights, merge, subset

FACTORS = {"amazon": 0.71, "movie": 0.43, "nyt": 1.13, "tweets": 0.257}
KINDS = [(torch.bfloat16,), (torch.float16,), (torch.float32, torch.bfloat16, torch.float16)]


@dataclass(frozen=True)
class MethodCase:
    """A method to test.

    Args:
        name: As it is registered.
        parameters: Other than its defaults.
        identity: Parameters and factor (of each of four members) at which members that are all one give that one, and one
            member alone gives itself at factor 1; None where there are none.
        exact_subsets: Whether a merge of some members of a pool has the bits of one of a pool of those; else it is close.
    """

    name: str
    parameters: Mapping[str, Value] = field(default_factory=dict)
    identity: tuple[Mapping[str, Value], float] | None = None
    exact_subsets: bool = True

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.parameters.items())])

    @property
    def factors(self) -> dict[str, float]:
        """A scaling factor for each member that the method can take."""
        return {m: FACTORS[m] for m in list(FACTORS)[: METHODS[self.name].most_members]}

    def complete(self, scaling: Mapping[str, float] | None = None) -> dict[str, Value]:
        """All parameters, for some scaling factors."""
        return complete(self.name, self.factors if scaling is None else scaling, self.parameters)

    def merge(
        self, weights: Sequence[Weight], scaling: Mapping[str, float] | None = None, **how: object
    ) -> dict[str, Tensor]:
        """Merges; see `merging.testing.weights.merge`."""
        factors = self.factors if scaling is None else scaling
        return merge(self.name, weights, factors, self.parameters, **how)  # type: ignore[arg-type]


class MethodTests:
    """Subclass it as `Test…`, with the fixture `case` (perhaps of several) and the method's `reference`.

    ```python
    class TestMagMax(MethodTests):
        @pytest.fixture
        def case(self):
            return MethodCase("magmax", {"lambda": 0.7})

        def reference(self, name, weights, factors, parameters, examples):
            ...  # float64, from the paper's formula
    ```
    """

    @pytest.fixture
    def case(self) -> MethodCase:
        """The method to test."""
        raise NotImplementedError("override the fixture `case`")

    def reference(
        self,
        name: str,
        weights: Sequence[Weight],
        factors: Mapping[str, float],
        parameters: Mapping[str, Value],
        examples: Mapping[str, int],
    ) -> Mapping[str, Tensor]:
        """What the merge must be, by name, in float64: slow, and obvious."""
        raise NotImplementedError("override `reference`")

    def test_agrees_with_its_reference(self, case: MethodCase) -> None:
        """On several pools."""
        for seed in range(3):
            weights = make_weights(seed)
            expected = self.reference(case.name, weights, case.factors, case.complete(), EXAMPLES)
            assert_close(case.merge(weights), expected)

    @pytest.mark.parametrize("dtypes", KINDS)
    def test_reads_any_floating_dtype_and_rounds_once(self, case: MethodCase, dtypes: Sequence[torch.dtype]) -> None:
        """Weights in 16 bits are the numbers that they hold."""
        weights = make_weights(5, dtypes=dtypes)
        expected = self.reference(case.name, weights, case.factors, case.complete(), {})
        full = case.merge(weights, examples={})
        assert_close(full, expected)
        rounded = case.merge(weights, examples={}, dtype=torch.bfloat16)
        assert all(value.dtype == torch.bfloat16 for value in rounded.values())
        assert identical(rounded, {key: value.to(torch.bfloat16) for key, value in full.items()})

    def test_order_of_members_does_not_matter(self, case: MethodCase) -> None:
        """To the bit."""
        weights, turned = make_weights(1), dict(reversed(case.factors.items()))
        assert identical(case.merge(weights), case.merge(weights, turned))

    def test_some_members_of_a_pool_are_a_pool_of_those(self, case: MethodCase) -> None:
        """What the others are makes no difference."""
        weights, some = make_weights(2), {"movie": 0.8, "tweets": 0.5}
        merged, expected = case.merge(weights, some), case.merge(subset(weights, some), some)
        assert identical(merged, expected) or not case.exact_subsets
        assert_close(merged, expected, tolerance=1e-6)

    @pytest.mark.parametrize("parts", [2, 5])
    def test_parts_merged_apart_are_the_whole(self, case: MethodCase, parts: int) -> None:
        """As shards and exports merge."""
        weights = make_weights(3)
        assert_close(case.merge(weights, parts=parts), case.merge(weights), tolerance=1e-6)

    def test_global_pass_does_not_depend_on_how_parts_are_combined(self, case: MethodCase) -> None:
        """In any order."""
        method, weights = METHODS[case.name], make_weights(3)
        a, b, c = (method.global_pass(weights[i::3]) for i in range(3))
        merged = []
        recipe = method.default_recipe(list(case.factors))
        for known in (method.combine(method.combine(a, b), c), method.combine(c, method.combine(b, a))):
            out = {w.name: torch.empty(w.base.shape) for w in weights}
            method.prepare(weights, Context(global_stats=known)).merge(recipe.scaling, recipe.parameters, out)
            merged.append(out)
        for key, value in merged[0].items():
            torch.testing.assert_close(value, merged[1][key], rtol=1e-6, atol=1e-7)

    def test_repeats_itself_to_the_bit_and_leaves_its_input_alone(self, case: MethodCase) -> None:
        """Whatever stood in the weights that it overwrites."""
        weights = make_weights(4)
        before = copy.deepcopy(weights)
        prepared = METHODS[case.name].prepare(weights, Context())
        first = {w.name: torch.empty(w.base.shape) for w in weights}
        second = {w.name: torch.full(w.base.shape, float("nan")) for w in weights}
        prepared.merge(case.factors, case.complete(), first)
        prepared.merge(dict.fromkeys(case.factors, 1.0), complete(case.name, case.factors), second)
        prepared.merge(case.factors, case.complete(), second)
        assert identical(first, second)
        for was, now in zip(before, weights, strict=True):
            assert torch.equal(was.base, now.base)
            assert identical(was.members, now.members)
            assert all(identical(was.statistics[kind], now.statistics[kind]) for kind in was.statistics)

    def test_a_candidate_has_the_same_bits_whatever_was_merged_before_it(self, case: MethodCase) -> None:
        """What a method keeps from one candidate to the next changes none."""
        weights, every = make_weights(8), case.factors
        scalings = [every, dict.fromkeys(every, 0.6), dict.fromkeys(list(every)[:2], 1.0), dict.fromkeys(every, 0.3)]

        def prepare() -> Prepared:
            return METHODS[case.name].prepare(weights, Context())

        def merged(prepared: Prepared, scaling: Mapping[str, float]) -> Tensor:
            out = {w.name: torch.empty(w.base.shape) for w in weights}
            prepared.merge(scaling, case.complete(scaling), out)
            return torch.cat([value.reshape(-1) for value in out.values()])

        alone = [merged(prepare(), scaling) for scaling in scalings]
        prepared = prepare()
        for turn in (0, 1, 2, 0, 3, 2, 2, 1):
            assert torch.equal(merged(prepared, scalings[turn]), alone[turn]), scalings[turn]

    def test_writes_into_live_parameters_of_any_layout(self, case: MethodCase) -> None:
        """Views are written where they lie."""
        weights = [w for w in make_weights(4) if w.base.dim() == 2]
        prepared, settings = METHODS[case.name].prepare(weights, Context()), case.complete()
        plain = {w.name: torch.empty(w.base.shape) for w in weights}
        live = {w.name: torch.nn.Parameter(torch.empty(w.base.shape[::-1])) for w in weights}
        prepared.merge(case.factors, settings, plain)
        prepared.merge(case.factors, settings, {key: value.T for key, value in live.items()})
        assert identical(plain, {key: value.detach().T for key, value in live.items()})

    def test_identical_members_give_that_member(self, case: MethodCase) -> None:
        """At the parameters of `identity`."""
        if case.identity is None:
            pytest.skip("it has no parameters at which identical members give that member")
        weights = make_weights(6)
        for w in weights:
            one = w.members["movie"]
            w.members.update(dict.fromkeys(w.members, one))  # type: ignore[attr-defined]
        parameters, factor = case.identity
        merged = merge(case.name, weights, dict.fromkeys(case.factors, factor), parameters)
        assert_close(merged, {w.name: w.members["movie"] for w in weights})

    def test_one_member_alone_is_that_member(self, case: MethodCase) -> None:
        """At the parameters of `identity`."""
        if case.identity is None:
            pytest.skip("it has no parameters at which one member alone is that member")
        weights = make_weights(7)
        merged = merge(case.name, weights, {"nyt": 1.0}, case.identity[0])
        assert_close(merged, {w.name: w.members["nyt"] for w in weights})

    def test_a_member_that_was_not_prepared_is_named(self, case: MethodCase) -> None:
        """With the nearest name that there is."""
        with pytest.raises(MethodError, match=r"'moovie'.*Did you mean 'movie'"):
            merge(case.name, make_weights(), {"moovie": 1.0})

    def test_a_member_of_another_shape_is_named(self, case: MethodCase) -> None:
        """With the weight."""
        weights, known = make_weights(), METHODS[case.name].global_pass(make_weights())
        weights[1].members["nyt"] = torch.zeros(3, 3)  # type: ignore[index]
        with pytest.raises(MethodError, match=r"nyt: 'layer\.0\.query\.weight' has shape"):
            METHODS[case.name].prepare(weights, Context(global_stats=known))

    def test_a_model_with_other_weights_is_refused(self, case: MethodCase) -> None:
        """Nothing is merged halfway and called whole."""
        prepared = METHODS[case.name].prepare(make_weights(), Context())
        recipe = METHODS[case.name].default_recipe(list(case.factors))
        with pytest.raises(MethodError, match=r"there is no weight '.*' to write to"):
            prepared.merge(recipe.scaling, recipe.parameters, {})

    def test_default_recipe_is_complete_and_inside_its_ranges(self, case: MethodCase) -> None:
        """What a search measures first."""
        method = METHODS[case.name]
        recipe = method.default_recipe(["a", "b"])
        assert method.complete(recipe) == recipe
        assert recipe.parameters.keys() == method.parameters.keys()
        for key, value in recipe.parameters.items():
            spec = method.parameters[key]
            if spec.choices is None and spec.low is not None and spec.high is not None:
                assert spec.low <= float(value) <= spec.high

    def test_damaged_statistics_are_refused_by_member_and_weight(self, case: MethodCase) -> None:
        """Of every kind that the method requires."""

        def damaged(kind: str, change: Callable[[dict[str, Tensor]], object]) -> list[Weight]:
            weights = make_weights()
            values = dict(weights[1].statistics[kind])
            change(values)
            weights[1].statistics[kind] = values  # type: ignore[index]
            return weights

        damages: dict[str, Callable[[dict[str, Tensor]], object]] = {
            "no ": lambda s: s.pop("nyt"),
            "has shape": lambda s: s.update(nyt=torch.ones(2, 2)),
            "NaN": lambda s: s.update(nyt=s["nyt"] * float("nan")),
            "negative": lambda s: s.update(nyt=-s["nyt"]),
        }
        for kind in METHODS[case.name].requires:
            for message, change in damages.items():
                with pytest.raises(MethodError, match=f"nyt: .*{message}") as caught:
                    METHODS[case.name].prepare(damaged(kind, change), Context())
                assert "layer.0.query.weight" in str(caught.value)
                assert "again" in str(caught.value)
