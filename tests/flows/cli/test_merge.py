import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from flows.cli.merge import merge_recipe
from flows.config.recipe_file import load_recipe
from flows.directory.progress import Display
from merging.checkpoints.checkpoint import Checkpoint
from merging.errors import MethodError, SettingsError, StorageError
from merging.io import addresses, atomic, storage
from merging.optimization.gradient_mismatch import quadratic_mismatch
from merging.statistics import STATISTICS, LikelihoodSettings, StatisticsFile, measure, save
from merging.statistics.statistic import Partial
from merging.statistics.statistics_file import save_tensors
from merging.tasks import TextClassificationSettings, make_task

MEMBERS = ("one", "two")


@pytest.fixture
def write_recipe(tiny_campaign, tmp_path):
    """Writes a recipe of two members, with the Fisher information of some: `write_recipe("one")`."""

    def write(*with_fisher):
        members = {}
        for name in MEMBERS:
            path = tiny_campaign["members"][name]["checkpoint"]
            members[name] = {"checkpoint": path}
            if name in with_fisher:
                task = make_task(name, TextClassificationSettings(**tiny_campaign["tasks"][name]), path)
                statistic = STATISTICS["fisher"](LikelihoodSettings(examples=4))
                partial = measure(task, statistic)
                file = str(tmp_path / f"{name}.safetensors")
                save(file, statistic, partial, checkpoint=Checkpoint.open(path).fingerprint, data="d")
                members[name]["statistics"] = [file]
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            yaml.safe_dump({"base": tiny_campaign["base"], "members": members, "method": "task_arithmetic"})
        )
        return str(recipe)

    return write


def test_the_mismatch_is_told_where_it_is_asked_for(write_recipe, tmp_path, capsys):
    recipe = write_recipe(*MEMBERS)
    merge_recipe(recipe, str(tmp_path / "out"), "float32", 1.0, Display(), mismatch=True)
    printed = capsys.readouterr()
    material = load_recipe(recipe).material()
    own = load_recipe(recipe).recipe()
    assert set(own.scaling.values()) == {0.3}
    expected = quadratic_mismatch(material, Checkpoint.open(str(tmp_path / "out")).read, own)
    shown = " ".join((printed.out + printed.err).split())
    assert expected.total > 0
    assert f"predicts it: {expected.total:.3g} (one {expected.members['one']:.3g}," in shown
    assert torch.float32 == Checkpoint.open(str(tmp_path / "out")).read("pooler.dense.weight").dtype


def test_a_mismatch_without_fisher_information_is_refused_before_anything_is_written(write_recipe, tmp_path):
    with pytest.raises(MethodError, match="needs the statistic 'fisher' of two"):
        merge_recipe(write_recipe("one"), str(tmp_path / "out"), None, 1.0, Display(), mismatch=True)
    assert not (tmp_path / "out").exists()


def test_nothing_but_an_earlier_merge_is_replaced(write_recipe, tiny_pool, tmp_path):
    """The directory is replaced whole: what else lay in it would be lost."""
    own = tmp_path / "own"
    shutil.copytree(tiny_pool["base"], own / "base")
    settings = yaml.safe_load(Path(write_recipe()).read_text()) | {"base": str(own / "base")}
    recipe = tmp_path / "own.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    for out, message in (
        (own / "base", "would replace .*base, where the base is"),
        (own, "would replace .*base, where the base is"),
        (tiny_pool["three"], "holds no earlier merge"),
        (tmp_path / "notes", "is not empty and holds no earlier merge"),
    ):
        before = sorted(out.rglob("*"))
        with pytest.raises((SettingsError, StorageError), match=message):
            merge_recipe(str(recipe), str(out), None, 1.0, Display())
        assert sorted(out.rglob("*")) == before
    for dtype in ("float32", "float16"):
        merge_recipe(str(recipe), str(tmp_path / "out"), dtype, 1.0, Display())
    assert Checkpoint.open(str(tmp_path / "out")).read("pooler.dense.weight").dtype == torch.float16


def test_a_file_called_recipe_makes_no_directory_an_earlier_merge(write_recipe, tmp_path, monkeypatch):
    recipe = Path(write_recipe())
    for out, message in (
        (tmp_path, "would replace .*where the recipe is"),
        (tmp_path / "link", "would replace .*where the recipe is"),
        (tmp_path / "cwd", "would replace the directory that this command runs in"),
        (tmp_path / "other", r"holds no earlier merge alone \(recipe.yaml, thesis.txt would be lost\)"),
    ):
        (tmp_path / "link").exists() or (tmp_path / "link").symlink_to(tmp_path)
        (tmp_path / "cwd" / "below").mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(tmp_path / "cwd" / "below")
        (tmp_path / "other").mkdir(exist_ok=True)
        shutil.copy(recipe, tmp_path / "other")
        (tmp_path / "other" / "thesis.txt").write_text("years of work")
        with pytest.raises((SettingsError, StorageError), match=message):
            merge_recipe(str(recipe), str(out), None, 1.0, Display())
    assert (tmp_path / "other" / "thesis.txt").exists()
    assert recipe.exists()


@pytest.mark.parametrize("change", ["added", "edited", "weights"])
@pytest.mark.parametrize("where", ["{tmp}/out", "memory://merges{tmp}"])
def test_what_a_user_changed_in_an_earlier_merge_stays(write_recipe, tmp_path, where, change):
    recipe, out = write_recipe(), where.format(tmp=tmp_path)
    merge_recipe(recipe, out, None, 1.0, Display())
    before = storage.list_files(out)
    merge_recipe(recipe, out, None, 1.0, Display())
    assert storage.list_files(out) == before
    name = {"added": "notes/thesis.txt", "edited": "tokenizer_config.json", "weights": "model.safetensors"}[change]
    atomic.write_bytes(addresses.join(out, name), b"years of work" * (200_000 if change == "weights" else 1))
    with pytest.raises(StorageError, match=f"{name} would be lost"):
        merge_recipe(recipe, out, None, 1.0, Display())
    assert storage.exists(addresses.join(out, name))


def test_a_remote_member_that_is_an_earlier_merge_is_not_replaced(write_recipe, tmp_path):
    recipe, first = write_recipe(), f"memory://first{tmp_path}"
    merge_recipe(recipe, first, None, 1.0, Display())
    settings = yaml.safe_load(Path(recipe).read_text())
    settings["members"]["one"]["checkpoint"] = first
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(settings))
    before = storage.list_files(first)
    for out in (first, first + "/", f"memory:///first/.{tmp_path}", first.rpartition("/")[0]):
        with pytest.raises(SettingsError, match="would replace .*where member 'one' is"):
            merge_recipe(str(tmp_path / "again.yaml"), out, None, 1.0, Display())
    assert storage.list_files(first) == before


def test_files_of_a_member_are_taken_where_the_recipe_says_so(write_recipe, tmp_path):
    settings = yaml.safe_load(Path(write_recipe()).read_text())
    for name in ("one", "two"):
        path = shutil.copytree(settings["members"][name]["checkpoint"], tmp_path / name)
        (path / "chat_template.jinja").write_text(f"of {name}")
        settings["members"][name]["checkpoint"] = str(path)
    for files_from, expected in (({}, None), ({"chat_template": "one"}, "of one"), ({"tokenizer": "two"}, "of two")):
        (tmp_path / "chat.yaml").write_text(yaml.safe_dump(settings | {"files_from": files_from}))
        merge_recipe(str(tmp_path / "chat.yaml"), str(tmp_path / "out"), None, 1.0, Display())
        template = tmp_path / "out" / "chat_template.jinja"
        assert (template.read_text() if template.exists() else None) == expected
        assert (
            load_recipe(str(tmp_path / "out" / "recipe.yaml")).files_from.model_dump(exclude_defaults=True)
            == files_from
        )
    (tmp_path / "chat.yaml").write_text(yaml.safe_dump(settings | {"files_from": {"tokenizer": "tow"}}))
    with pytest.raises(SettingsError, match="files_from.tokenizer: unknown member 'tow'. Did you mean 'two'"):
        load_recipe(str(tmp_path / "chat.yaml"))


def test_a_recipe_with_a_secret_is_refused_without_repeating_it(write_recipe, tmp_path, capsys):
    settings = yaml.safe_load(Path(write_recipe()).read_text())
    settings["members"]["one"]["checkpoint"] = "zip://x::https://user:hunter2@host/x.zip"
    (tmp_path / "secret.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SettingsError, match="members.one.checkpoint: the address holds a password") as reported:
        merge_recipe(str(tmp_path / "secret.yaml"), str(tmp_path / "out"), None, 1.0, Display())
    assert "hunter2" not in str(reported.value) + "".join(capsys.readouterr())


def test_a_merge_in_another_dtype_is_loaded_in_it(write_recipe, tmp_path):
    merge_recipe(write_recipe(), str(tmp_path / "out"), "bfloat16", 1.0, Display())
    assert {value.dtype for value in AutoModel.from_pretrained(tmp_path / "out").parameters()} == {torch.bfloat16}


def test_a_merge_of_adapters_is_written_as_an_adapter_where_the_recipe_says_so(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, intermediate_size=24)).save_pretrained(tmp_path / "base")
    for name in "ab":
        lora = LoraConfig(r=2, init_lora_weights=False, target_modules=["query", "dense"])
        get_peft_model(AutoModel.from_pretrained(tmp_path / "base"), lora).save_pretrained(tmp_path / name)
    recipe = {"base": "base", "members": {"a": "a", "b": "b"}, "method": "core+tsv_m", "max_distance": None}
    for name, more in {"full": {}, "adapter": {"export": "adapter"}}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**recipe, **more}))
        merge_recipe(str(tmp_path / f"{name}.yaml"), str(tmp_path / f"out-{name}"))
    assert load_recipe(str(tmp_path / "out-adapter" / "recipe.yaml")).export == "adapter"
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".merge-")]
    base = AutoModel.from_pretrained(tmp_path / "base")
    adapted = dict(PeftModel.from_pretrained(base, tmp_path / "out-adapter").merge_and_unload().named_parameters())
    for name, value in AutoModel.from_pretrained(tmp_path / "out-full").named_parameters():
        torch.testing.assert_close(adapted[name], value, rtol=0, atol=1e-5)


def test_merging_imports_torch_and_nothing_else_that_takes_seconds(tiny_pool, tmp_path):
    """Nor does a head of two classes, which has the shape of BERT's token types, look like a weight that may be tied."""
    recipe = {"base": str(tiny_pool["base"]), "members": {"one": str(tiny_pool["one"])}, "method": "average"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"scaling": {"one": 1.0}}))
    dear = "{'numba', 'transformers', 'sklearn', 'pandas', 'pyarrow', 'optuna', 'ray', 'scipy', 'matplotlib'}"
    script = "import sys, flows.cli.merge; flows.cli.merge.merge_recipe('recipe.yaml', 'out'); "
    script += f"print(sorted({dear} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(("parameters", "rho"), [({}, 0.1), ({"rho": 0.7}, 0.7)])
def test_a_t5_s_regmean_has_the_rho_of_its_paper(parameters, rho, tmp_path):
    config = T5Config(
        vocab_size=11, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    members = {}
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.01 * seed * torch.randn_like(value))
        model.save_pretrained(tmp_path / name)
        if name == "base":
            continue
        grams = {}
        for own, value in model.state_dict().items():
            if value.dim() == 2 and own.endswith(
                ("q.weight", "k.weight", "v.weight", "o.weight", "wi.weight", "wo.weight")
            ):
                x = torch.randn(30, value.shape[1])
                grams[own] = x.T @ x / 30
        file = str(tmp_path / f"{name}.gram.safetensors")
        about = Partial(counts={"examples": 30, "tokens": 30})
        fingerprint = Checkpoint.open(str(tmp_path / name)).fingerprint
        save_tensors(file, "gram", {}, grams, about, checkpoint=fingerprint, data="d")
        members[name] = {"checkpoint": str(tmp_path / name), "statistics": [file]}
    settings = {"base": str(tmp_path / "base"), "members": members, "method": "regmean", "parameters": parameters}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    merge_recipe(str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), "float32", 1.0, Display())
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["parameters"]["rho"] == rho
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    weights = {m: Checkpoint.open(str(tmp_path / m)).read(name).double() for m in members}
    softened = {}
    for m, settings in members.items():
        gram = StatisticsFile.open(settings["statistics"][0]).read(name).double()
        softened[m] = rho * gram + (1 - rho) * gram.diagonal().diag()
    expected = torch.linalg.solve(sum(softened.values()), sum(softened[m] @ weights[m].T for m in members)).T
    result = Checkpoint.open(str(tmp_path / "out")).read(name)
    torch.testing.assert_close(result, expected.float(), rtol=1e-5, atol=1e-6)


def test_a_file_of_slices_is_a_model_of_as_many_layers_and_repeats_itself(tiny_pool, tmp_path, capsys):
    part = {"source": "one", "layers": 1, "scale": {"*.output.dense.weight": 0.5}}
    value = {
        "base": str(tiny_pool["base"]),
        "members": {"one": str(tiny_pool["one"])},
        "slices": [{"source": "base", "layers": "0-"}, part],
    }
    (tmp_path / "slices.yaml").write_text(yaml.safe_dump(value))
    merge_recipe(str(tmp_path / "slices.yaml"), str(tmp_path / "out"), None, 1.0, Display())
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert len(model.encoder.layer) == 3
    name = "encoder.layer.{}.attention.output.dense.weight"
    assert torch.equal(
        model.state_dict()[name.format(2)], 0.5 * Checkpoint.open(str(tiny_pool["one"])).read(f"bert.{name.format(1)}")
    )
    again = tmp_path / "out" / "recipe.yaml"
    assert str(tmp_path) not in again.read_text()
    merge_recipe(str(again), str(tmp_path / "twice"), None, 1.0, Display())
    first, second = (Checkpoint.open(str(tmp_path / out)).fingerprint for out in ("out", "twice"))
    assert first == second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "ties"}, "method: unknown key"),
        ({"slices": [{"source": "base", "layers": "5-2"}]}, "names no layers"),
        ({"slices": []}, "expected at least one"),
        ({"slices": [{"source": "base", "layers": 0, "scale": {"*": "x"}}]}, "slices.0.scale"),
        ({"rest": "two"}, "rest: 'two' is no member"),
    ],
)
def test_mistakes_in_slices_are_named_and_nothing_is_written(change, message, tiny_pool, tmp_path):
    value = {"base": str(tiny_pool["base"]), "slices": [{"source": "base", "layers": 0}], **change}
    (tmp_path / "slices.yaml").write_text(yaml.safe_dump(value))
    with pytest.raises((SettingsError, MethodError), match=message):
        merge_recipe(str(tmp_path / "slices.yaml"), str(tmp_path / "out"), None, 1.0, Display())
    assert not (tmp_path / "out").exists()
