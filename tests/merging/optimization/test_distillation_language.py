"""Distillation of language models: their completions, or all their tokens, whatever batches they run in."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from merging.checkpoints.pool import Pool
from merging.mergers.material import Material
from merging.mergers.resident import ResidentMerger
from merging.optimization.distillation import distil
from merging.optimization.distillation_settings import DistillationSettings
from merging.optimization.distiller import Distiller
from merging.optimization.losses import SharedModels
from merging.recipe import Recipe
from merging.tasks import CausalLMSettings, make_task

WORDS = "the cat dog sat ran on a mat hill big small red and then home".split()  # noqa: SIM905
MEMBERS = ("one", "two")
START = Recipe("task_arithmetic", dict.fromkeys(MEMBERS, 0.4))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pool_and_tasks(tmp_path_factory):
    """A tied Llama, two members that differ from it, and prompts with completions of unlike lengths."""
    place = tmp_path_factory.mktemp("language")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {word: 4 + n for n, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    random = np.random.default_rng(0)
    for name in ("base", *MEMBERS):
        if name != "base":
            torch.manual_seed(len(name) + ord(name[0]))
            for value in model.parameters():
                value.data += 0.05 * torch.randn_like(value)
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    tasks = []
    for number, name in enumerate(MEMBERS):
        rows = [
            {
                key: " ".join(random.choice(WORDS, random.integers(1, most)))
                for key, most in (("prompt", 7), ("completion", 4))
            }
            for _ in range(11 + number)
        ]
        file = place / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        tasks.append(make_task(name, CausalLMSettings(kind="causal_lm", data={"train": str(file)}), str(place / name)))
    pool = Pool.open(str(place / "base"), {name: str(place / name) for name in MEMBERS})
    return pool, tasks, {name: name for name in MEMBERS}


def reference(pool, tasks, owners, units, counts, whole, top_k):
    """The loss in float64, from one unpadded example after another."""
    merged = SharedModels(pool, tasks, owners, CPU)
    ResidentMerger(Material(pool), merged.weights).merge(Material(pool).check(START))
    total, size = 0.0, sum(map(len, units))
    for task, model, places, count in zip(tasks, merged.models, units, counts, strict=True):
        teacher, model = task.load_model().double(), model.double()
        for place in places:
            (example,) = (task.split("train")[at] for at in task.order("train")[[place]])
            prompt, target = (task.tokenizer(text)["input_ids"] for text in (example.prompt, example.completions[0]))
            ids = torch.tensor([[*prompt, *target]])
            kept = slice(None) if whole else slice(len(prompt) - 1, None)
            with torch.no_grad():
                own, other = (one(ids[:, :-1]).logits[0, kept] for one in (model, teacher))
            q, p = own.softmax(-1), other.softmax(-1)
            if top_k:
                top = p.topk(top_k, -1).indices
                q, p = (torch.cat([x.gather(1, top), 1 - x.gather(1, top).sum(1, keepdim=True)], 1) for x in (q, p))
            loss = (p * (p / q).log()).sum(-1).mean()
            total += float(loss) * sum(counts) / len(tasks) / count / size
    return total


@pytest.mark.parametrize("teachers", ["cached", "live"])
@pytest.mark.parametrize(("targets", "top_k"), [("completion", None), ("all", None), ("completion", 5), ("all", 5)])
def test_the_loss_is_that_of_single_examples(pool_and_tasks, tmp_path, targets, top_k, teachers):
    pool, tasks, owners = pool_and_tasks
    settings = DistillationSettings(batch=12, targets=targets, top_k=top_k, teachers=teachers, held_out=0.2)
    made = Distiller(Material(pool), tasks, owners, START, settings, CPU, str(tmp_path))
    counts = [len(places) for places in made.schedule._places]
    wanted = reference(pool, tasks, owners, made.schedule.step(0), counts, targets == "all", top_k)
    result = sum(made.gradient(0, part).loss for part in range(settings.parts))
    assert result == pytest.approx(wanted, rel=1e-3)


def test_a_merge_comes_nearer_to_its_members(pool_and_tasks, tmp_path):
    pool, tasks, owners = pool_and_tasks
    settings = DistillationSettings(steps=20, batch=8, learning_rate=3e-3, held_out=0.2, top_k=6)
    result = distil(Material(pool), tasks, owners, START, settings, CPU, cache=str(tmp_path))
    assert result.looks[-1].training < 0.7 * result.looks[1].training
    assert set(result.weights) == set(pool.weights)
