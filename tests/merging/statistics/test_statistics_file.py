import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merging.checkpoints.checkpoint import Checkpoint
from merging.errors import StatisticsError, StorageError
from merging.io import atomic
from merging.statistics import (
    STATISTICS,
    Fisher,
    Gram,
    LikelihoodSettings,
    OutputGram,
    OutputGramSettings,
    Partial,
    Representation,
    RepresentationSettings,
    Statistic,
    StatisticSettings,
    StatisticsFile,
    measure,
    save,
)

FINGERPRINT = "00aa11bb22cc33dd"


def write(path: Path, statistic: Statistic, partial: Partial) -> StatisticsFile:
    return save(str(path), statistic, partial, checkpoint=FINGERPRINT, data="feedfeedfeedfeed")


def small(kind: str, sums: dict[str, Tensor], **more: object) -> tuple[Statistic, Partial]:
    statistic = STATISTICS[kind](STATISTICS[kind].settings_type())
    return statistic, Partial(sums, {"examples": 2, "tokens": 5}, **more)


def change(path: Path, metadata: dict[str, str | None] | None = None, **tensors: Tensor) -> None:
    """Writes the file again with other metadata or other tensors."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    merged = {**header["__metadata__"], **(metadata or {})}
    kept = {name: value.clone() for name, value in load_file(path).items()}
    save_file({**kept, **tensors}, path, {name: value for name, value in merged.items() if value is not None})


@pytest.fixture
def fisher_file(tmp_path: Path) -> Path:
    path = tmp_path / "amazon.fisher.safetensors"
    write(path, *small("fisher", {"w": torch.ones(3, 2), "b": torch.ones(3)}))
    return path


@pytest.fixture
def gram_file(tmp_path: Path) -> Path:
    path = tmp_path / "amazon.gram.safetensors"
    write(path, *small("gram", {"q": torch.eye(2)}, shared={"k": "q"}, transposed=("k",)))
    return path


def test_round_trip_of_a_measured_gram(build, tmp_path):
    task = build("bert")
    statistic = Gram(StatisticSettings(examples=5))
    partial = measure(task, statistic)
    file = write(tmp_path / "gram.safetensors", statistic, partial)
    assert (file.kind, file.checkpoint, file.data) == ("gram", FINGERPRINT, "feedfeedfeedfeed")
    assert (file.examples, file.tokens) == (5, int(task.mask[:5].sum()))
    assert file.settings == statistic.key()
    assert file.mergequest
    means = statistic.finalize(partial)
    assert set(file.names) == {*means, *partial.shared}
    for name in file.names:
        stored = partial.shared.get(name, name)
        assert torch.equal(file.read(name), means[stored])
        assert file.shape(name) == tuple(means[stored].shape)


@pytest.mark.parametrize(
    "statistic",
    [
        Fisher(LikelihoodSettings(estimator="sampled", seed=4)),
        OutputGram(OutputGramSettings()),
        Representation(RepresentationSettings(pooling="mean")),
    ],
    ids=lambda statistic: statistic.kind,
)
def test_round_trip_of_the_other_kinds(build, tmp_path, statistic):
    partial = measure(build("bert"), statistic)
    file = write(tmp_path / "file.safetensors", statistic, partial)
    assert file.settings == statistic.key()
    for name, value in statistic.finalize(partial).items():
        assert torch.equal(file.read(name), value)


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "gpt2", "t5"])
def test_names_and_shapes_are_the_checkpoints(build, tmp_path, name):
    """As `save_pretrained` writes it, after `from_pretrained` has read it."""
    task = build(name)
    task.load_model().save_pretrained(tmp_path / "member")
    task.model = type(task.model).from_pretrained(tmp_path / "member").double()
    tensors = Checkpoint.open(str(tmp_path / "member")).tensors
    fisher = Fisher(LikelihoodSettings(estimator="empirical"))
    outputs = OutputGram(OutputGramSettings(estimator="empirical"))
    for statistic in (fisher, Gram(StatisticSettings()), outputs):
        file = write(tmp_path / statistic.kind, statistic, measure(task, statistic))
        file.check(FINGERPRINT, tensors)
        assert set(file.names) <= set(tensors)
    assert set(StatisticsFile.open(str(tmp_path / "fisher")).names) == set(tensors)


def test_shared_names_are_one_object(gram_file):
    file = StatisticsFile.open(str(gram_file))
    query = file.read("q")
    assert file.read("k") is query
    assert file.read("q") is query
    assert file.transposed == {"k"}


def test_it_travels_to_other_processes(gram_file):
    file = pickle.loads(pickle.dumps(StatisticsFile.open(str(gram_file))))
    assert torch.equal(file.read("k"), torch.eye(2) / 2)


def test_statistics_of_another_checkpoint_are_refused(fisher_file):
    file = StatisticsFile.open(str(fisher_file))
    file.check(FINGERPRINT)
    with pytest.raises(StatisticsError, match=r"amazon\.fisher.*another checkpoint.*compute it again"):
        file.check("ffffffffffffffff")


def test_statistics_of_other_shapes_are_refused(build, tmp_path):
    task = build("gpt2")
    task.load_model().save_pretrained(tmp_path / "member")
    tensors = Checkpoint.open(str(tmp_path / "member")).tensors
    weight, name = torch.eye(64), "transformer.h.0.mlp.c_proj.weight"
    good = write(tmp_path / "good", *small("gram", {name: weight}, transposed=(name,)))
    good.check(FINGERPRINT, tensors)
    bad = write(tmp_path / "bad", *small("gram", {name: weight}))
    with pytest.raises(StatisticsError, match=rf"{name}.*\[64, 64\].*\[16, 16\]"):
        bad.check(FINGERPRINT, tensors)
    strange = write(tmp_path / "strange", *small("gram", {"other.weight": weight}))
    with pytest.raises(StatisticsError, match="'other.weight', which the checkpoint lacks"):
        strange.check(FINGERPRINT, tensors)


def test_a_missing_name_is_named(fisher_file):
    with pytest.raises(StatisticsError, match="no fisher for 'nowhere'"):
        StatisticsFile.open(str(fisher_file)).read("nowhere")


def test_missing_truncated_and_foreign_files(fisher_file, tmp_path):
    with pytest.raises(StatisticsError, match="does not exist"):
        StatisticsFile.open(str(tmp_path / "nothing.safetensors"))
    whole = fisher_file.read_bytes()
    fisher_file.write_bytes(whole[:-4])
    with pytest.raises(StatisticsError, match="truncated"):
        StatisticsFile.open(str(fisher_file))
    fisher_file.write_bytes(b"not at all")
    with pytest.raises(StatisticsError, match="not a safetensors file"):
        StatisticsFile.open(str(fisher_file))
    save_file({"w": torch.ones(2)}, fisher_file, {"format": "pt"})
    with pytest.raises(StatisticsError, match="no statistics file"):
        StatisticsFile.open(str(fisher_file))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format_version": "2"}, "update mergequest"),
        ({"format_version": "new"}, "cannot be understood"),
        ({"kind": None}, "cannot be understood"),
        ({"examples": "many"}, "cannot be understood"),
        ({"shared": "{"}, "cannot be understood"),
        ({"shared": '{"k": "lost"}'}, "share 'lost'"),
    ],
)
def test_unusable_metadata(fisher_file, metadata, message):
    change(fisher_file, metadata)
    with pytest.raises(StatisticsError, match=message):
        StatisticsFile.open(str(fisher_file))


@pytest.mark.parametrize(
    ("value", "message"),
    [(torch.tensor([1.0, -1.0]), "1 negative entries"), (torch.tensor([torch.inf, 0.0]), "NaN or Inf")],
)
def test_unusable_fisher(fisher_file, value, message):
    change(fisher_file, b=value)
    file = StatisticsFile.open(str(fisher_file))
    with pytest.raises(StatisticsError, match=f"'b' holds {message}"):
        file.read("b")
    assert torch.equal(file.read("w"), torch.full((3, 2), 0.5))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
        (torch.ones(2, 3), "not square"),
        (torch.full((2, 2), torch.nan), "NaN or Inf"),
    ],
)
def test_unusable_gram(gram_file, value, message):
    change(gram_file, q=value)
    with pytest.raises(StatisticsError, match=message):
        StatisticsFile.open(str(gram_file)).read("k")


def test_what_cannot_be_finalized_leaves_no_file(tmp_path):
    path = tmp_path / "bad.safetensors"
    with pytest.raises(StatisticsError, match="NaN or Inf"):
        write(path, *small("fisher", {"w": torch.tensor([torch.nan])}))
    assert not path.exists()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        write(tmp_path / "file" / "x.safetensors", *small("fisher", {"w": torch.ones(1)}))


def test_works_at_other_addresses(gram_file):
    address = "memory://statistics/gram.safetensors"
    atomic.write_bytes(address, gram_file.read_bytes())
    file = StatisticsFile.open(address)
    assert file.read("k") is file.read("q")
    assert torch.equal(file.read("q"), torch.eye(2) / 2)
