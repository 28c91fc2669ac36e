import pytest
import torch
from safetensors.torch import save_file

from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.pool import Pool
from merging.errors import CheckpointError, MethodError, StatisticsError
from merging.mergers.material import Material, open_statistics
from merging.mergers.resident import ResidentMerger
from merging.methods import METHODS
from merging.statistics.imported import import_statistics

TINY = ("one", "two", "three")


@pytest.fixture
def grams(tiny_material):
    """Member → parameter → its Gram, as our own files have them."""
    files = tiny_material.material.statistics["gram"]
    return {member: {name: files[member].read(name) for name in files[member].names} for member in TINY}


def merged(pool, files):
    material = Material(pool, open_statistics(pool, files))
    out = {name: torch.empty(info.shape) for name, info in pool.weights.items()}
    ResidentMerger(material, out).merge(METHODS["regmean"].default_recipe(TINY, pool.model_type))
    return out


@pytest.mark.parametrize("form", ["means", "sums", "pickle", "layers", "bare", "wrapped"])
def test_published_grams_merge_as_our_own(form, grams, tiny_material, tiny_pool, tmp_path):
    """Whatever others call layers, and whether they publish sums or means, RegMean is the same."""
    pool = Pool.open(str(tiny_pool["base"]), {name: str(tiny_pool[name]) for name in TINY})
    files = {}
    for member in TINY:
        tokens = tiny_material.material.statistics["gram"][member].tokens
        tensors = {name: value * tokens if form == "sums" else value.clone() for name, value in grams[member].items()}
        if form == "layers":
            tensors = {name.removesuffix(".weight"): value for name, value in tensors.items()}
        if form == "bare":
            tensors = {name.removeprefix("bert.").removesuffix(".weight"): value for name, value in tensors.items()}
        if form == "wrapped":
            tensors = {f"module.{name}": value for name, value in tensors.items()}
        source = tmp_path / f"{member}.{'pt' if form == 'pickle' else 'safetensors'}"
        if form == "pickle":
            torch.save(tensors, source)
        else:
            save_file(tensors, source)
        result = import_statistics(
            str(source),
            "gram",
            str(tiny_pool[member]),
            str(tmp_path / f"{member}.gram.safetensors"),
            tokens=tokens,
            sums=form == "sums",
            pickled=form == "pickle",
        )
        files[member] = (result.path,)
        assert (result.tokens, set(result.names)) == (tokens, set(grams[member]))
    own = {member: (tiny_material.material.statistics["gram"][member].path,) for member in TINY}
    ours, theirs = merged(pool, own), merged(pool, files)
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, atol=1e-6, rtol=1e-5)


def test_a_layer_that_was_not_published_is_no_expert_without_tokens(grams, tiny_material, tiny_pool, tmp_path):
    pool = Pool.open(str(tiny_pool["base"]), {name: str(tiny_pool[name]) for name in TINY})
    files = {member: (tiny_material.material.statistics["gram"][member].path,) for member in TINY}
    left_out = next(name for name in grams["one"] if name.endswith("intermediate.dense.weight"))
    save_file(
        {name: value.clone() for name, value in grams["one"].items() if name != left_out}, tmp_path / "g.safetensors"
    )
    out = str(tmp_path / "one.gram.safetensors")
    files["one"] = (
        import_statistics(str(tmp_path / "g.safetensors"), "gram", str(tiny_pool["one"]), out, tokens=10).path,
    )
    with pytest.raises(
        MethodError, match=rf"one: no gram for '{left_out.removeprefix('bert.')}', which other members have"
    ):
        merged(pool, files)


def test_fishers(tiny_material, tiny_pool, tmp_path):
    file = tiny_material.material.statistics["fisher"]["one"]
    values = {name: file.read(name) * 24 for name in file.names}
    save_file(values, tmp_path / "f.safetensors")
    result = import_statistics(
        str(tmp_path / "f.safetensors"), "fisher", str(tiny_pool["one"]), str(tmp_path / "o.safetensors"),
        tokens=200, examples=24, sums=True,
    )  # fmt: skip
    assert result.checkpoint == Checkpoint.open(str(tiny_pool["one"])).fingerprint
    for name in file.names:
        torch.testing.assert_close(result.read(name), file.read(name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: {**g, "no.such.layer": torch.eye(3)}, "'no.such.layer' is no matrix of"),
        (lambda g: {name: value[:-1, :-1] for name, value in g.items()}, "has shape"),
        (lambda g: {name: value + torch.triu(value.abs()) for name, value in g.items()}, "not symmetric"),
        (lambda g: {name: -value for name, value in g.items()}, "negative entries on its diagonal"),
        (lambda g: {name: value * torch.nan for name, value in g.items()}, "NaN or Inf"),
        (lambda g: {name: value.long() for name, value in g.items()}, "floating-point"),
        (lambda g: {**g, next(iter(g)).removesuffix(".weight"): next(iter(g.values()))}, "two tensors are the gram"),
    ],
)
def test_what_cannot_be_a_gram_of_the_checkpoint_is_refused(change, message, grams, tiny_pool, tmp_path):
    torch.save(change({name: value.clone() for name, value in grams["two"].items()}), tmp_path / "g.pt")
    with pytest.raises(StatisticsError, match=message):
        import_statistics(
            str(tmp_path / "g.pt"),
            "gram",
            str(tiny_pool["two"]),
            str(tmp_path / "o.safetensors"),
            tokens=9,
            pickled=True,
        )
    assert not (tmp_path / "o.safetensors").exists()


def test_a_pickle_is_asked_for_and_runs_nothing(grams, tiny_pool, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save(grams["two"], tmp_path / "g.pt")
    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    for name, pickled, error, message in (
        ("g.pt", False, StatisticsError, "--pickle"),
        ("evil.pt", True, CheckpointError, "more than tensors"),
    ):
        with pytest.raises(error, match=message):
            import_statistics(
                str(tmp_path / name), "gram", str(tiny_pool["two"]), str(tmp_path / "o"), tokens=9, pickled=pickled
            )
    assert not (tmp_path / "ran").exists()


def test_counts_are_needed(grams, tiny_pool, tmp_path):
    save_file({name: value.clone() for name, value in grams["two"].items()}, tmp_path / "g.safetensors")
    for counts in ({"tokens": 0}, {"tokens": 4, "sums": True}):
        kind = "fisher" if counts["tokens"] else "gram"
        with pytest.raises(StatisticsError, match="a number from 1"):
            import_statistics(
                str(tmp_path / "g.safetensors"), kind, str(tiny_pool["two"]), str(tmp_path / "o.safetensors"), **counts
            )
