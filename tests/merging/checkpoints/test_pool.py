import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, MixtralConfig, MixtralForCausalLM, ViTConfig, ViTForImageClassification

from merging.checkpoints.checkpoint import SINGLE
from merging.checkpoints.pool import Pool
from merging.checkpoints.validation import check_weights
from merging.errors import PoolError


def members_of(tiny_pool):
    return {name: str(path) for name, path in tiny_pool.items() if name != "base"}


@pytest.fixture
def damaged(tiny_pool, tmp_path):
    """A copy of member `two` whose tensors a test may change: `damaged(change)` returns the members with it."""

    def change(edit):
        path = tmp_path / "two"
        shutil.copytree(tiny_pool["two"], path)
        values = load_file(path / SINGLE)
        save_file(edit(values) or values, path / SINGLE)
        return members_of(tiny_pool) | {"two": str(path)}

    return change


def test_bare_base_and_task_models_meet(tiny_pool):
    pool = Pool.open(str(tiny_pool["base"]), members_of(tiny_pool))
    base = load_file(tiny_pool["base"] / SINGLE)
    assert set(pool.weights) == set(base)
    assert (
        pool.members["one"].names["encoder.layer.0.output.dense.weight"] == "bert.encoder.layer.0.output.dense.weight"
    )
    assert set(pool.members["one"].head) == {"classifier.weight", "classifier.bias"}
    two = load_file(tiny_pool["two"] / SINGLE)
    for name in pool.weights:
        assert torch.equal(pool.base_weight(name), base[name])
        assert torch.equal(pool.member_weight("two", name), two["bert." + name])


def test_a_base_with_a_head_of_its_own(tiny_pool, tmp_path):
    model = BertForMaskedLM.from_pretrained(tiny_pool["base"])
    model.save_pretrained(tmp_path / "mlm")
    pool = Pool.open(str(tmp_path / "mlm"), members_of(tiny_pool))
    assert "bert.encoder.layer.1.output.dense.bias" in pool.weights
    assert not any(name.startswith("cls.") for name in pool.weights)
    assert any("cls." in note for note in pool.notes)
    assert "bert.pooler.dense.weight" in pool.members["one"].head, "the base has no pooler: each task keeps its own"


def test_heads_that_all_share_are_merged_unless_named(tiny_pool):
    base, members = str(tiny_pool["two"]), {"three": str(tiny_pool["three"])}
    assert "classifier.weight" in Pool.open(base, members).weights
    kept = Pool.open(base, members, heads=["classifier.*"])
    assert "classifier.weight" not in kept.weights
    assert set(kept.members["three"].head) == {"classifier.weight", "classifier.bias"}


def test_heads_that_leave_nothing_or_match_nothing_are_told(tiny_pool):
    base, members = str(tiny_pool["base"]), members_of(tiny_pool)
    with pytest.raises(PoolError, match=r"share no floating-point weights to merge: `heads` \(\*\) keeps them all"):
        Pool.open(base, members, heads=["*"])
    assert "`heads`: no member has a tensor 'clasifier.*'" in Pool.open(base, members, heads=["clasifier.*"]).notes


def test_heads_of_different_size_are_kept(tiny_pool):
    pool = Pool.open(str(tiny_pool["two"]), {"one": str(tiny_pool["one"]), "three": str(tiny_pool["three"])})
    assert not any(name.startswith("classifier") for name in pool.weights)
    for member in pool.members.values():
        assert set(member.head) == {"classifier.weight", "classifier.bias"}


def test_every_disagreement_at_once(tiny_pool, damaged):
    def edit(values):
        name = "bert.encoder.layer.0.output.dense.weight"
        values[name] = values[name][:, :-1].contiguous()
        del values["bert.encoder.layer.1.output.dense.bias"]
        values["bert.encoder.layer.2.output.dense.bias"] = torch.zeros(32)

    with pytest.raises(PoolError) as caught:
        Pool.open(str(tiny_pool["base"]), damaged(edit))
    message = str(caught.value)
    assert "two: 'bert.encoder.layer.0.output.dense.weight' has shape [32, 47], the base has [32, 48]" in message
    assert "two: has no 'encoder.layer.1.output.dense.bias'" in message
    assert "two: 'bert.encoder.layer.2.output.dense.bias' is not in the base" in message


def test_another_architecture(tiny_pool, tmp_path, save_base):
    other = save_base(tmp_path / "other", num_hidden_layers=2)
    values = {f"strange.{name}": value for name, value in load_file(other / SINGLE).items()}
    save_file({name.replace("encoder", "stack"): value for name, value in values.items()}, other / SINGLE)
    with pytest.raises(PoolError, match="other: .* it is another model"):
        Pool.open(str(tiny_pool["base"]), {"other": str(other)})


def saved_by_another_version(model, path):
    """Writes a model under its own names, where `save_pretrained` gives it those of its first version."""
    model.save_pretrained(path)
    save_file({name: value.clone() for name, value in model.state_dict().items()}, path / SINGLE)


@pytest.mark.parametrize("which", ["base", "two"])
def test_weights_that_another_version_called_otherwise(which, tmp_path):
    config = ViTConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    values = {}
    for name in ("base", "one", "two"):
        model = ViTForImageClassification(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)  # no two are equal
        (saved_by_another_version if name == which else ViTForImageClassification.save_pretrained)(
            model, tmp_path / name
        )
        values[name] = model.state_dict()
    pool = Pool.open(str(tmp_path / "base"), {name: str(tmp_path / name) for name in ("one", "two")})
    assert not pool.notes
    own = [next(key for key, v in values["base"].items() if v.equal(pool.base_weight(name))) for name in pool.weights]
    assert sorted(own) == sorted(values["base"])
    for member in ("one", "two"):
        for name, key in zip(pool.weights, own, strict=True):
            assert pool.member_weight(member, name).equal(values[member][key])


@pytest.mark.parametrize("which", [["one"], ["one", "two"]])
def test_experts_that_another_version_stored_joined(which, tmp_path):
    config = MixtralConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=16,
        num_local_experts=2,
    )
    for name in ("base", "one", "two"):
        save = saved_by_another_version if name in which else MixtralForCausalLM.save_pretrained
        save(MixtralForCausalLM(config), tmp_path / name)
    with pytest.raises(PoolError, match=r"one: stores as .*experts.*, in other parts: save both by one version"):
        Pool.open(str(tmp_path / "base"), {name: str(tmp_path / name) for name in ("one", "two")})


def test_settings_that_leave_no_trace_in_shapes(tiny_pool, tmp_path):
    path = shutil.copytree(tiny_pool["two"], tmp_path / "two")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 2, "hidden_act": "relu"}))
    with pytest.raises(
        PoolError, match=r"(?s)two: config.json has num_attention_heads = 2, the base has 4.*hidden_act"
    ):
        Pool.open(str(tiny_pool["base"]), {"two": str(path)})


def test_mixed_dtypes_are_a_note(tiny_pool, damaged):
    pool = Pool.open(str(tiny_pool["base"]), damaged(lambda v: {n: t.bfloat16() for n, t in v.items()}))
    assert any("'two' mix dtypes" in note for note in pool.notes)
    assert max(check_weights(pool).values()) < 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unusable_weights_are_named(tiny_pool, damaged, value, dtype):
    def edit(values):
        values["bert.embeddings.word_embeddings.weight"][3, 1] = value
        return {name: tensor.to(dtype) for name, tensor in values.items()}

    pool = Pool.open(str(tiny_pool["base"]), damaged(edit))
    with pytest.raises(PoolError, match="two: 'embeddings.word_embeddings.weight' holds NaN or Inf"):
        check_weights(pool)


def test_members_of_another_base(tiny_pool, tmp_path, save_base):
    other = save_base(tmp_path / "other", seed=7)
    pool = Pool.open(str(other), {"one": str(tiny_pool["one"])})
    with pytest.raises(PoolError, match=r"not fine-tuned from the base .*one \(1\.\d\d\)"):
        check_weights(pool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_are_of_all_merged_matrices(tiny_pool, damaged, dtype):
    members = damaged(lambda values: {name: tensor.to(dtype) for name, tensor in values.items()})
    pool = Pool.open(str(tiny_pool["base"]), members)
    matrices = [name for name, info in pool.weights.items() if len(info.shape) > 1]
    base = torch.cat([pool.base_weight(name).flatten() for name in matrices]).double()
    two = torch.cat([pool.member_weight("two", name).flatten() for name in matrices]).double()
    assert check_weights(pool)["two"] == pytest.approx(((two - base).norm() / base.norm()).item(), rel=1e-5)


def test_a_look_at_some_entries_says_nearly_the_same(tiny_pool, tmp_path, save_base):
    pool = Pool.open(str(tiny_pool["base"]), members_of(tiny_pool))
    whole, some = check_weights(pool), check_weights(pool, most=200)
    assert all(some[name] == pytest.approx(whole[name], rel=0.1) for name in whole)
    assert some != whole
    other = save_base(tmp_path / "other", seed=7)
    with pytest.raises(PoolError, match=r"not fine-tuned from the base .*one \(1\.\d\d\)"):
        check_weights(Pool.open(str(other), {"one": str(tiny_pool["one"])}), most=200)


def test_an_empty_pool(tiny_pool):
    with pytest.raises(PoolError, match="at least one member"):
        Pool.open(str(tiny_pool["base"]), {})


def test_how_far_a_member_may_be_is_a_setting(tiny_pool, tmp_path, save_base):
    pool = Pool.open(str(save_base(tmp_path / "other", seed=7)), {"one": str(tiny_pool["one"])})
    with pytest.raises(PoolError, match=r"set `max_distance` \(now 0.9; null for no bound\)"):
        check_weights(pool)
    assert 1.0 < check_weights(pool, max_distance=None)["one"] < 1.6
    assert check_weights(pool, max_distance=1.6) == check_weights(pool, max_distance=None)


@pytest.mark.parametrize("head", ["classifier", "out_proj"])
@pytest.mark.parametrize(
    ("ours", "theirs", "fits"),
    [
        (["bad", "fine", "good"], ["bad", "fine", "good"], True),
        (["bad", "fine", "good"], ["good", "fine", "bad"], False),
        (["bad", "fine", "good"], ["ham", "spam", "eggs"], False),
        (["bad", "fine", "good"], None, True),
        (None, ["good", "fine", "bad"], True),
    ],
)
def test_heads_are_merged_where_their_classes_are_the_same(tiny_pool, tmp_path, ours, theirs, fits, head):
    paths = []
    for name, labels in (("two", ours), ("three", theirs)):
        path = shutil.copytree(tiny_pool[name], tmp_path / name)
        names = labels or [f"LABEL_{number}" for number in range(3)]
        config = json.loads((path / "config.json").read_text())
        config |= {"id2label": dict(enumerate(names)), "label2id": {label: row for row, label in enumerate(names)}}
        (path / "config.json").write_text(json.dumps(config))
        if head == "out_proj":  # as RoBERTa's head has it
            values = load_file(path / SINGLE)
            values |= {f"classifier.out_proj.{part}": values.pop(f"classifier.{part}") for part in ("weight", "bias")}
            save_file(values, path / SINGLE, {"format": "pt"})
        paths.append(str(path))
    if fits:
        assert any("classifier" in name for name in Pool.open(paths[0], {"three": paths[1]}).weights)
        return
    with pytest.raises(
        PoolError, match=r"three: the classes of its head are .*keep heads per task with `heads: \['classifier"
    ):
        Pool.open(paths[0], {"three": paths[1]})
    assert Pool.open(paths[0], {"three": paths[1]}, heads=["classifier.*"]).weights


def test_a_module_that_a_member_lacks_can_be_kept_per_task(tiny_pool, damaged):
    base = str(tiny_pool["base"])
    members = damaged(lambda values: {key: value for key, value in values.items() if ".pooler." not in key})
    with pytest.raises(PoolError, match=r"two: has no 'pooler.dense.bias' .* `heads: \['pooler.\*'\]`"):
        Pool.open(base, members)
    pool = Pool.open(base, members, heads=["pooler.*"])
    assert not any("pooler" in name for name in pool.weights)
    assert "bert.pooler.dense.weight" in pool.members["one"].head
    assert not any("no member has a tensor" in note for note in pool.notes)


def test_members_whose_classes_differ_though_the_base_names_none(tiny_pool, tmp_path):
    paths = {}
    for name, labels in (("base", "012"), ("a", ["bad", "fine", "good"]), ("b", ["good", "fine", "bad"])):
        path = shutil.copytree(tiny_pool["two"], tmp_path / name)
        names = [f"LABEL_{label}" for label in labels] if name == "base" else list(labels)
        config = json.loads((path / "config.json").read_text())
        config |= {"id2label": dict(enumerate(names)), "label2id": {label: row for row, label in enumerate(names)}}
        (path / "config.json").write_text(json.dumps(config))
        paths[name] = str(path)
    base = paths.pop("base")
    with pytest.raises(
        PoolError, match=r"b: the classes of its head are in another order .*, 'a' \['bad', 'fine', 'good'\]"
    ):
        Pool.open(base, paths)
    assert Pool.open(base, {"a": paths["a"]}).weights


def test_rows_of_embeddings_are_no_classes(tiny_pool, tmp_path):
    """Two token types, and two classes of other names in each member of a bare base."""
    members = {}
    for name in ("two", "three"):
        members[name] = str(shutil.copytree(tiny_pool[name], tmp_path / name))
        config = json.loads((tmp_path / name / "config.json").read_text())
        config |= {"id2label": {0: f"no {name}", 1: name}, "label2id": {f"no {name}": 0, name: 1}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    pool = Pool.open(str(tiny_pool["base"]), members)
    assert pool.weights["embeddings.token_type_embeddings.weight"].shape[0] == 2
