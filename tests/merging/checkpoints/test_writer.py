import json
import resource

import pytest
import torch
from safetensors.torch import load_file

from merging.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint
from merging.checkpoints.writer import lay_out, new_checkpoint
from merging.errors import CheckpointError, StorageError

MIXED = {
    "flags": torch.tensor([True, False, True]),
    "half": torch.arange(7).bfloat16(),
    "wide": torch.randn(2, 3, dtype=torch.float64),
    "scalar": torch.tensor(2.5),
    "none": torch.zeros(0, 4, dtype=torch.float16),
    "count": torch.tensor([1, 2], dtype=torch.int64),
}


def outlines(tensors):
    return [(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]


def fill(files, tensors, backwards=False):
    for shard in files.shards:
        with files.open(shard) as put:
            infos = list(shard.tensors.values())
            for info in reversed(infos) if backwards else infos:
                put(info.start, tensors[info.name])


@pytest.mark.parametrize("most", [1 << 20, 30, 1])
@pytest.mark.parametrize("where", ["{tmp}/out", "memory://written/{tmp}"])
def test_what_is_written_is_read_by_safetensors(tiny_pool, tmp_path, most, where):
    like = Checkpoint.open(str(tiny_pool["base"]))
    path = where.format(tmp=tmp_path)
    with new_checkpoint(path, lay_out(outlines(MIXED), most), like=like, extra={"heads/a/x.txt": "hello"}) as files:
        fill(files, MIXED, backwards=not files.in_order)
    again = Checkpoint.open(path)
    assert set(again.tensors) == set(MIXED)
    for name, value in MIXED.items():
        assert again.read(name).dtype == value.dtype
        assert torch.equal(again.read(name), value), name
    assert all(info.start % info.dtype.itemsize == 0 for info in again.tensors.values()), "aligned"
    assert again.config == like.config
    if "://" not in path:
        found = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
        assert set(found) == set(MIXED)
        assert (tmp_path / "out" / "heads/a/x.txt").read_text() == "hello"
        assert (tmp_path / "out" / "tokenizer.json").exists()
        assert (tmp_path / "out" / INDEX).exists() == (most < 100)


def test_files_stay_below_the_limit():
    sizes = [3, 4, 5, 1, 1, 20, 2]
    tensors = [(str(number), torch.float16, (size,)) for number, size in enumerate(sizes)]
    shards = lay_out(tensors, 16)
    assert [list(shard.tensors) for shard in shards] == [["0", "1"], ["2", "3", "4"], ["5"], ["6"]]
    assert [shard.name for shard in shards][-1] == "model-00004-of-00004.safetensors"
    assert lay_out(tensors, 1000)[0].name == SINGLE


@pytest.mark.parametrize("where", ["{tmp}/out", "memory://replaced/{tmp}"])
def test_what_was_there_is_replaced_whole(tiny_pool, tmp_path, where):
    like = Checkpoint.open(str(tiny_pool["base"]))
    path = where.format(tmp=tmp_path)
    for tensors, most in ((MIXED, 1 << 20), ({"a": torch.ones(3), "b": torch.ones(2)}, 4)):
        with new_checkpoint(path, lay_out(outlines(tensors), most), like=like) as files:
            fill(files, tensors)
        assert set(Checkpoint.open(path).tensors) == set(tensors)


@pytest.mark.parametrize("where", ["{tmp}/out", "memory://interrupted/{tmp}"])
def test_an_interruption_leaves_no_checkpoint(tiny_pool, tmp_path, where):
    like = Checkpoint.open(str(tiny_pool["base"]))
    path = where.format(tmp=tmp_path)

    def interrupted():
        with new_checkpoint(path, lay_out(outlines(MIXED)), like=like) as files:
            fill(files, MIXED)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match=r"no checkpoint directory|has no config.json"):
        Checkpoint.open(path)


def test_a_full_disk_is_found_before_anything_is_merged(tiny_pool, tmp_path):
    like = Checkpoint.open(str(tiny_pool["base"]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with (
            pytest.raises(StorageError, match=r"cannot write .*out: File too large"),
            new_checkpoint(str(tmp_path / "out"), lay_out([("a", torch.float32, (1 << 19,))]), like=like),
        ):
            pytest.fail("there is no room for it")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_index_names_every_tensor(tiny_pool, tmp_path):
    like = Checkpoint.open(str(tiny_pool["base"]))
    with new_checkpoint(str(tmp_path / "out"), lay_out(outlines(MIXED), 30), like=like) as files:
        fill(files, MIXED)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert set(index["weight_map"]) == set(MIXED)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in MIXED.values())
