"""A merge of LoRA adapters as an adapter of its own: what it adds to the base, as factors, in PEFT's files."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from merging.checkpoints.adapters.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from merging.checkpoints.adapters.lora import PREFIX
from merging.checkpoints.models import skeleton
from merging.checkpoints.models.parameter_names import conv1d
from merging.checkpoints.pool import Pool
from merging.errors import MethodError
from merging.io import atomic
from merging.io.addresses import is_local

LOST = 1e-3
"""Largest share of a weight's change that its factors may leave out: what rounding of base and merge to float32 explains."""
ROUNDING = 1e-6
"""Change of a weight that no member moves, as a share of its norm, which rounding explains."""


def write_adapter(
    pool: Pool,
    members: Sequence[str],
    merged: Callable[[str], Tensor],
    path: str,
    extra: Mapping[str, str | bytes | None] | None = None,
) -> dict[str, int]:
    """Writes θ − θ_0 of a merge as a LoRA adapter of the base, whole or not at all.

    A weight's rank is at most the sum of its members' ranks, which the change of any merge in core space has, and that of any
    linear one.

    Args:
        pool: Base and members.
        members: Those that were merged; adapters, all of them.
        merged: Name → the merged weight, float32 or wider; read one by one.
        path: The directory to write; local.
        extra: Name → further files.

    Returns:
        Name of each weight that the adapter changes → its rank.

    Raises:
        MethodError: A member is no adapter, a weight that is no matrix of a layer changed, or its change is of a higher rank.
    """
    if not is_local(path):
        raise MethodError(f"{path}: adapters are written to local directories; copy it from there")
    if whole := [member for member in members if not pool.members[member].checkpoint.is_adapter]:
        raise MethodError(
            f"'{whole[0]}' is a whole model, and a merge with it no adapter: leave out `export: adapter`, or name the "
            "adapter's own directory"
        )
    model = skeleton.build(pool.base.path, pool.base.config, pool.base.architecture)
    live = skeleton.live_names(model, pool.base.tensors)
    modules = dict(model.named_modules(remove_duplicate=False))
    inputs = model.get_input_embeddings()  # type: ignore[operator]
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    paths: dict[str, int] = {}
    turned = False
    for name in pool.weights:
        base = pool.base_weight(name).double()
        change, most = merged(name).double() - base, _most(pool, members, name)
        if not change.any() or (not most and change.norm() <= ROUNDING * base.norm()):
            continue
        own = live.get(name, "")
        layer = modules.get(own.removesuffix(".weight"))
        is_embedding = isinstance(layer, nn.Embedding)
        if change.dim() != 2 or not (is_embedding or isinstance(layer, nn.Linear | conv1d())):
            raise MethodError(
                f"the merge changes '{name}', which is no matrix of a layer, so that no adapter holds it: leave out `export: "
                "adapter`"
            )
        if layer is inputs and pool.base.config.get("tie_word_embeddings"):
            raise MethodError(
                f"the merge changes '{name}', which the base ties to its output layer, and an adapter would change one of both "
                "alone: leave out `export: adapter`"
            )
        left, right = _factors(name, change, most)
        module = own.removesuffix(".weight")
        ranks[name] = paths[module] = left.shape[1]
        if is_embedding:
            tensors[f"{PREFIX}{module}.lora_embedding_A"] = left.T.float().contiguous()
            tensors[f"{PREFIX}{module}.lora_embedding_B"] = right.T.float().contiguous()
            continue
        if isinstance(layer, conv1d()):  # stored [in, out]
            left, right, turned = right.T, left.T, True
        tensors[f"{PREFIX}{module}.lora_A.weight"] = right.float().contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = left.float().contiguous()
    if not tensors:
        raise MethodError("the merge is the base itself: there is nothing that an adapter would add")
    settings = _settings(pool.base.path, paths, turned)
    with atomic.new_dir(path) as directory:
        save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (directory / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        for file, content in (extra or {}).items():
            if content is not None:
                target: Path = directory / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.encode() if isinstance(content, str) else content)
    return ranks


def _most(pool: Pool, members: Sequence[str], name: str) -> int:
    """The sum of the members' ranks at a weight; 0 where some member holds it in full."""
    factors = [pool.member_factors(member, name) for member in members]
    return sum(pair[1].shape[0] for pair in factors if pair is not None) if None not in factors else 0


def _factors(name: str, change: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """L [rows, r] and R [r, columns], float64, whose product is a change, by its largest singular values.

    Raises:
        MethodError: The change has a higher rank.
    """
    u, s, vt = torch.linalg.svd(change, full_matrices=False)
    rank = min(most, int((s > LOST * 1e-2 * s[0]).sum()))
    lost = float(s[rank:].norm() / s.norm())
    if lost > LOST:
        raise MethodError(
            f"the merge's change of '{name}' is of a higher rank than its members' together ({most}; {lost:.1%} would be "
            "lost): merge in core space (core+METHOD), or leave out `export: adapter`"
        )
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def _settings(base: str, ranks: Mapping[str, int], turned: bool) -> dict[str, Any]:
    """`adapter_config.json`; each layer's alpha is its rank, so that factors count as they are."""
    largest = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": turned,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
