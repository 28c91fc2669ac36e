import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from merging.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint
from merging.checkpoints.directories.companions import companions
from merging.checkpoints.directories.manifest import MANIFEST
from merging.checkpoints.directories.writer import lay_out, new_checkpoint
from merging.errors import CheckpointError, StorageError
from merging.io import addresses, atomic, hashing, storage

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
        result = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
        assert set(result) == set(MIXED)
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
    with new_checkpoint(path, lay_out(outlines(MIXED), 30), like=like) as files:  # what was left is in nobody's way
        fill(files, MIXED)
    assert set(Checkpoint.open(path).tensors) == set(MIXED)
    shards = {shard.name for shard in lay_out(outlines(MIXED), 30)}
    assert {name for name in storage.list_dir(path) if name.endswith(".safetensors")} == shards


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


KEPT = (
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "LICENSE",
    "USE_POLICY.md",
    "additional_chat_templates/tool_use.jinja",
    "assets/voices/one.json",
    "bpe.codes",
    "chat_template.jinja",
    "config.json",
    "entity_vocab.json",
    "modeling_x.py",
    "modules.json",
    "normalizer.json",
    "params.json",
    "spm.model",
    "tekken.json",
    "tokenizer.model.v3",
    "video_preprocessor_config.json",
)
LEFT = (
    ".cache/huggingface/x.json",
    ".gitattributes",
    "README.md",
    "adapter_config.json",
    "checkpoint-500/config.json",
    "checkpoint-500/model.safetensors",
    "consolidated.00.pth",
    "flax_model.msgpack",
    "gguf/model.gguf",
    "heads/a/config.json",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "onnx/config.json",
    "onnx/model.onnx",
    "original/params.json",
    "pytorch_model.bin",
    "recipe.yaml",
    "tf_model.h5",
    "training_args.bin",
)


@pytest.mark.parametrize("where", ["local", "memory", "moto"])
def test_all_but_weights_goes_into_the_merge_with_its_folders(tmp_path, where, request):
    if where == "moto":
        root = request.getfixturevalue("s3_at")(request.getfixturevalue("moto_endpoint"))
    else:
        root = str(tmp_path) if where == "local" else f"memory://companions{tmp_path}"
    path = addresses.join(root, "models", "base")
    for name in (*KEPT, *LEFT):
        atomic.write_text(addresses.join(path, name), f"of {name}")
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ]
    atomic.write_json(addresses.join(path, "modules.json"), modules)
    assert companions(path) == (sorted(KEPT), [])
    like = Checkpoint(path, {}, {}, {})
    out = addresses.join(root, "models", "out")
    with new_checkpoint(out, lay_out(outlines(MIXED)), like=like) as files:
        fill(files, MIXED, backwards=not files.in_order)
    assert sorted(storage.list_files(out)) == sorted({*KEPT, SINGLE, MANIFEST})
    for name in KEPT:
        assert storage.read_bytes(addresses.join(out, name)) == storage.read_bytes(addresses.join(path, name))
    with new_checkpoint(out, lay_out(outlines(MIXED)), like=like) as files:  # replaces what it wrote
        fill(files, MIXED, backwards=not files.in_order)
    atomic.write_text(addresses.join(out, "1_Pooling/notes.txt"), "years of work")
    with pytest.raises(StorageError, match=r"1_Pooling/notes.txt would be lost"), new_checkpoint(out, (), like=like):
        pytest.fail("there is something else")


def test_links_to_files_are_followed_and_others_are_not(tmp_path):
    """As in a hub's cache, where all files are links; a folder that links to its parent has no end."""
    (tmp_path / "blob").write_text("x")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "LICENSE").symlink_to(tmp_path / "blob")
    (tmp_path / "base" / "again").symlink_to(tmp_path / "base")
    (tmp_path / "base" / "nowhere").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "base" / "pipe")
    assert companions(str(tmp_path / "base")) == (["LICENSE"], [])


def test_everything_is_durable_before_the_directory_gets_its_name(tiny_pool, tmp_path, monkeypatch):
    like = Checkpoint.open(str(tiny_pool["base"]))
    synced, missing = set(), []
    fsync, rename = os.fsync, os.rename

    def watch(handle):
        synced.add(str(Path(f"/proc/self/fd/{handle}").readlink()))
        fsync(handle)

    def renamed(self, target):
        missing.extend(str(path) for path in [self, *self.rglob("*")] if str(path) not in synced)
        rename(self, target)

    monkeypatch.setattr(os, "fsync", watch)
    monkeypatch.setattr("pathlib.Path.rename", renamed)
    with new_checkpoint(str(tmp_path / "out"), lay_out(outlines(MIXED)), like=like, extra={"a/b": "c"}) as files:
        fill(files, MIXED)
    assert missing == []
    assert str(tmp_path) in synced


KILLED = """
import os, signal, sys
from pathlib import Path
from merging.io import atomic
with atomic.new_dir(sys.argv[1]) as directory:
    (directory / "model.safetensors").write_bytes(bytes(1000))
    print(directory, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_merge_left_goes_with_the_next_and_what_a_living_one_writes_stays(tmp_path):
    out = str(tmp_path / "out")
    other = tmp_path / ".out.notes.tmp"
    other.mkdir()
    writers = [
        subprocess.Popen([sys.executable, "-c", KILLED, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    dead, living = (writer.stdout.readline().strip() for writer in writers)
    writers[0].send_signal(signal.SIGKILL)
    writers[0].wait()
    with atomic.new_dir(out) as directory:
        assert not Path(dead).exists()
        assert Path(living).exists()
        (directory / "x").write_text("x")
    writers[1].communicate("")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([other.name, "out"])


def test_files_are_closed_where_the_disk_is_full(tiny_pool, tmp_path, monkeypatch):
    like = Checkpoint.open(str(tiny_pool["base"]))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with (
            pytest.raises(StorageError, match="No space left"),
            new_checkpoint(str(tmp_path / "out"), lay_out(outlines(MIXED), 30), like=like),
        ):
            pytest.fail("there is no room for it")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


class OwnError(Exception):
    """What a store's client raises, which is no OSError."""


@pytest.mark.parametrize(
    "do",
    [
        storage.exists,
        storage.is_dir,
        storage.list_dir,
        storage.list_files,
        storage.read_bytes,
        storage.size,
        storage.checksum,
        storage.remove,
        hashing.file_fingerprint,
        lambda path: atomic.write_bytes(path, b"x"),
        lambda path: atomic.create(path, b"x"),
    ],
)
def test_a_client_s_own_errors_name_the_address(do, monkeypatch):
    class Broken(fsspec.AbstractFileSystem):
        protocol = "broken"
        cachable = False

        def __getattribute__(self, name):
            if name in ("exists", "isdir", "ls", "find", "cat_file", "size", "info", "open", "pipe_file", "rm_file"):
                raise OwnError("HttpError 403 for https://x/y?sig=hunter2")
            return super().__getattribute__(name)

    fsspec.register_implementation("broken", Broken, clobber=True)
    with pytest.raises(StorageError, match=r"broken://a/b: OwnError: HttpError 403.*sig=\*\*\*"):
        do("broken://a/b")
