"""mergekit beside mergequest: tiny models of many architectures, merged by one configuration each way, and compared.

make mergekit-parity    # writes docs/mergekit.md anew from what it measures
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from rich.console import Console
from safetensors.torch import load_file

from flows.cli.merge import merge_recipe
from flows.directory.progress import Display
from merging.errors import MergequestError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "mergekit.md"
START, END = "<!-- measured -->", "<!-- end -->"
ENVIRONMENT = Path(os.environ.get("MERGEKIT_ENV") or ROOT / ".mergekit")
SIZE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
ENCODER = {name: value for name, value in SIZE.items() if "key_value" not in name}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ARCHITECTURES: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {**SIZE, "tie_word_embeddings": False}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**SIZE, "tie_word_embeddings": False, "head_dim": 8}),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**SIZE, "tie_word_embeddings": True}),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**SIZE, "tie_word_embeddings": True, "head_dim": 8}),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {**SIZE, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "Phi-3": ("Phi3ForCausalLM", "Phi3Config", {**SIZE, **TOKENS}),
    "OLMo 2": ("Olmo2ForCausalLM", "Olmo2Config", {**SIZE, "pad_token_id": 0, "eos_token_id": 2}),
    "StarCoder 2": ("Starcoder2ForCausalLM", "Starcoder2Config", {**SIZE, "tie_word_embeddings": False}),
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64, "n_positions": 64},
    ),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", ENCODER),
    "Mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**SIZE, "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    ),
    "BERT": ("BertForSequenceClassification", "BertConfig", ENCODER),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", {**SIZE, "head_dim": 8}),
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**SIZE, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "Cohere": ("CohereForCausalLM", "CohereConfig", {**SIZE, **TOKENS}),
    "Granite": ("GraniteForCausalLM", "GraniteConfig", {**SIZE, "tie_word_embeddings": False}),
    "StableLM": ("StableLmForCausalLM", "StableLmConfig", {**SIZE, "tie_word_embeddings": False}),
    "Phi": ("PhiForCausalLM", "PhiConfig", {**SIZE, "tie_word_embeddings": False}),
    "GLM-4": ("Glm4ForCausalLM", "Glm4Config", {**SIZE, **TOKENS, "head_dim": 8, "tie_word_embeddings": False}),
    "Mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 64, "state_size": 8, "tie_word_embeddings": False},
    ),
    "Qwen3-MoE": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            **SIZE,
            "head_dim": 8,
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
        },
    ),
    "RoBERTa": ("RobertaForSequenceClassification", "RobertaConfig", {**ENCODER, **TOKENS}),
    "DistilBERT": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4, "vocab_size": 64, "max_position_embeddings": 64},
    ),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "vocab_size": 64},
    ),
    "DeepSeek-V3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **SIZE,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "tie_word_embeddings": False,
        },
    ),
    "ViT": (
        "ViTForImageClassification",
        "ViTConfig",
        VISION,
    ),
    "LLaVA": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **SIZE},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
            "image_token_id": 63,
        },
    ),
}
"""Name → class, configuration's class, configuration. mergekit infers the last three; it has definitions of the others."""
LAYERS = 3
TABLE = 9
"""Architectures of one table, which must not be wider than a page."""


def _models(names: tuple[str, ...], **parameters: Any) -> list[dict[str, Any]]:
    return [{"model": name, **({"parameters": parameters} if parameters else {})} for name in names]


def _three(**parameters: Any) -> list[dict[str, Any]]:
    return _models(("one", "two", "three"), **parameters)


MERGES: Mapping[str, dict[str, Any]] = {
    "linear": {
        "merge_method": "linear",
        "models": [
            {"model": "one", "parameters": {"weight": 1.0}},
            {"model": "two", "parameters": {"weight": 0.3}},
            {"model": "three", "parameters": {"weight": 0.5}},
        ],
    },
    "linear, gradient and filter": {
        "merge_method": "linear",
        "models": [
            {"model": "one", "parameters": {"weight": [1.0, 0.2, 0.6]}},
            {"model": "two", "parameters": {"weight": [{"filter": "mlp", "value": 0.25}, {"value": 0.75}]}},
        ],
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "one",
        "models": _models(("one", "two")),
        "parameters": {"t": 0.3},
    },
    "slerp by slices, filters": {
        "merge_method": "slerp",
        "base_model": "one",
        "slices": [
            {
                "sources": [
                    {"model": "one", "layer_range": [0, LAYERS]},
                    {"model": "two", "layer_range": [0, LAYERS]},
                ]
            }
        ],
        "parameters": {
            "t": [
                {"filter": "attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
                {"value": 0.5},
            ]
        },
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": _three(weight=0.4),
        "parameters": {"lambda": 0.8},
    },
    "ties": {"merge_method": "ties", "base_model": "base", "models": _three(weight=0.5, density=0.5)},
    "ties, sum": {
        "merge_method": "ties",
        "base_model": "base",
        "models": _three(weight=0.5, density=0.5),
        "parameters": {"normalize": False, "lambda": 1.3},
    },
    "breadcrumbs": {
        "merge_method": "breadcrumbs",
        "base_model": "base",
        "models": _three(weight=0.5, density=0.5, gamma=0.125),
    },
    "breadcrumbs_ties": {
        "merge_method": "breadcrumbs_ties",
        "base_model": "base",
        "models": _three(weight=0.5, density=0.5, gamma=0.125),
    },
    "model_stock": {"merge_method": "model_stock", "base_model": "base", "models": _three()},
    "model_stock, by filter": {
        "merge_method": "model_stock",
        "base_model": "base",
        "models": _three(),
        "parameters": {"filter_wise": True},
    },
    "nuslerp": {"merge_method": "nuslerp", "base_model": "base", "models": _models(("one", "two"), weight=0.5)},
    "nuslerp, by rows": {
        "merge_method": "nuslerp",
        "models": _models(("one", "two"), weight=0.5),
        "parameters": {"nuslerp_flatten": False},
    },
    "karcher": {"merge_method": "karcher", "models": _three()},
    "multislerp": {"merge_method": "multislerp", "base_model": "base", "models": _three(weight=0.5)},
    "sce": {
        "merge_method": "sce",
        "base_model": "base",
        "models": _three(),
        "parameters": {"select_topk": 0.5},
    },
    "nearswap": {
        "merge_method": "nearswap",
        "base_model": "base",
        "models": _models(("one",)),
        "parameters": {"t": 0.005},
    },
    "arcee_fusion": {"merge_method": "arcee_fusion", "base_model": "base", "models": _models(("one",))},
    "ram": {"merge_method": "ram", "base_model": "base", "models": _three(), "parameters": {"epsilon": 0.005}},
    "ramplus_tl": {
        "merge_method": "ramplus_tl",
        "base_model": "base",
        "models": _three(),
        "parameters": {"epsilon": 0.005},
    },
    "passthrough": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "one", "layer_range": [0, 2]}]},
            {
                "sources": [
                    {
                        "model": "two",
                        "layer_range": [1, LAYERS],
                        "parameters": {"scale": [{"filter": "down_proj", "value": 0.5}, {"value": 1.0}]},
                    }
                ]
            },
        ],
    },
    "dare_linear, density 1": {
        "merge_method": "dare_linear",
        "base_model": "base",
        "models": _three(weight=0.4, density=1.0),
    },
    "dare_ties": {"merge_method": "dare_ties", "base_model": "base", "models": _three(weight=0.4, density=0.5)},
    "della": {"merge_method": "della", "base_model": "base", "models": _three(weight=0.4, density=0.5)},
}
"""mergekit configurations; models' directories are relative to the file."""


@dataclass(frozen=True)
class Cell:
    """What was seen of one architecture and merge.

    Args:
        far: Entries that differ by more than 1e-6 and one unit in the last place.
        entries: All entries of tensors that both wrote.
        largest: Largest difference.
        missing: Tensors that mergekit did not write.
        error: Why one of the two refused, or nothing.
        both: Whether both did.
    """

    far: int = 0
    entries: int = 0
    largest: float = 0.0
    missing: tuple[str, ...] = ()
    error: str = ""
    both: bool = False

    @property
    def mark(self) -> str:
        """For the table."""
        if self.both:
            return "–"
        if self.error:
            return "refused" if self.error.startswith("mergequest") else "✗"
        return ("=" if not self.far else "≠") + ("†" if self.missing else "")


def build(root: Path, architecture: str) -> Path:
    """Base and three models moved by noise, written by transformers."""
    model_class, config_class, settings = ARCHITECTURES[architecture]
    place = root / architecture.replace(" ", "-")
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)).float()
    model.save_pretrained(place / "base")
    start = {name: value.clone() for name, value in model.named_parameters()}
    shared = {name: torch.randn_like(value) * 0.01 for name, value in start.items()}  # task vectors agree in part
    for seed, name in enumerate(("one", "two", "three"), start=1):
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, value in model.named_parameters():
                value.copy_(start[key] + torch.randn_like(value) * 0.01 + shared[key])
        model.save_pretrained(place / name)
    return place


def measure(root: Path, architectures: list[str], merges: list[str]) -> dict[tuple[str, str], Cell]:
    """Merges everything both ways and compares."""
    jobs, cells = [], {}
    for architecture in architectures:
        place = build(root, architecture)
        for number, merge in enumerate(merges):
            settings = json.loads(json.dumps(MERGES[merge]))
            file = place / f"{number}.yaml"
            file.write_text(yaml.safe_dump(_absolute(settings, place)))
            jobs.append((architecture, merge, file, place / f"theirs-{number}", place / f"ours-{number}"))
    listed = root / "jobs.json"
    listed.write_text(json.dumps([[str(file), str(theirs)] for _, _, file, theirs, _ in jobs]))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    script = str(Path(__file__).with_name("run_mergekit.py"))
    done = subprocess.run(
        [str(ENVIRONMENT / "bin" / "python"), script, str(listed)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for architecture, merge, file, theirs, ours in jobs:
        cells[architecture, merge] = _compare(ARCHITECTURES[architecture][0], file, theirs, ours)
    return cells


def _absolute(value: Any, place: Path) -> Any:
    if isinstance(value, dict):
        named = {"model", "base_model"}
        return {
            k: str(place / v) if k in named and isinstance(v, str) else _absolute(v, place) for k, v in value.items()
        }
    return [_absolute(entry, place) for entry in value] if isinstance(value, list) else value


def _compare(model_class: str, file: Path, theirs: Path, ours: Path) -> Cell:
    refused = f"mergekit: {error.read_text()}" if (error := theirs / "error.txt").exists() else ""
    try:
        merge_recipe(str(file), str(ours), None, 1.0, Display(Console(quiet=True)))
    except MergequestError as error:
        return Cell(error=f"{refused} mergequest: {error}".strip(), both=bool(refused))
    if refused:
        return Cell(error=refused)
    mine, other = _tensors(ours), _tensors(theirs)
    if mine.keys() != other.keys():  # mergekit writes mixtures as transformers holds them
        mine, other = _loaded(model_class, ours), _loaded(model_class, theirs)
    far = entries = 0
    largest = 0.0
    for name in mine.keys() & other.keys():
        distance = (mine[name].double() - other[name].double()).abs()
        step = torch.finfo(torch.float32).eps * other[name].double().abs()
        far += int((distance > torch.clamp(step, min=1e-6)).sum())
        entries += distance.numel()
        largest = max(largest, float(distance.max()))
    return Cell(far, entries, largest, tuple(sorted(mine.keys() - other.keys())))


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


def table(cells: Mapping[tuple[str, str], Cell]) -> str:
    """Merges by architectures, in Markdown."""
    architectures = list(dict.fromkeys(architecture for architecture, _ in cells))
    lines = []
    for first in range(0, len(architectures), TABLE):
        shown = architectures[first : first + TABLE]
        lines += ["", "| merge | " + " | ".join(shown) + " |", "|---|" + "---|" * len(shown)]
        for merge in dict.fromkeys(merge for _, merge in cells):
            marks = " | ".join(cells[architecture, merge].mark for architecture in shown)
            lines.append(f"| {merge} | {marks} |")
    counts = {mark: sum(cell.mark == mark for cell in cells.values()) for mark in ("=", "=†")}
    lines += ["", f"{counts['=']} of {len(cells)} are equal, and {counts['=†']} in all that mergekit writes."]
    return "\n".join(lines[1:])


def page_with(measured: str) -> str:
    """The page with another table between its marks."""
    before, _, rest = PAGE.read_text().partition(START)
    return f"{before}{START}\n{measured}\n{END}{rest.partition(END)[2]}"


def _loaded(model_class: str, path: Path) -> dict[str, torch.Tensor]:
    """What transformers loads, without what it finds no tensor for."""
    model, info = getattr(transformers, model_class).from_pretrained(path, dtype="auto", output_loading_info=True)
    return {name: value for name, value in model.state_dict().items() if name not in info["missing_keys"]}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(Path(scratch), list(ARCHITECTURES), list(MERGES))
    for (architecture, merge), cell in result.items():
        seen = f"{cell.far} of {cell.entries} far, at most {cell.largest:.2g}; {len(cell.missing)} missing {cell.error[:200]}"
        sys.stdout.write(f"{architecture}, {merge}: {cell.mark} {seen}\n")
    PAGE.write_text(page_with(table(result)))
