"""What a live model's parameters are in the checkpoint: their names there, and how they are stored.

`transformers` takes seconds to import, and a merge of files needs none of it: it is imported where a live model is looked at.
"""

import torch
from torch import nn


def checkpoint_names(model: nn.Module) -> dict[int, str]:
    """`id` of each parameter → the name under which `save_pretrained` writes it.

    Of tied weights the first name counts, under which they are saved. Where transformers renames weights as
    it loads them (ViT), the renaming is reverted; where it joins several into one (experts), the model's own
    name is kept.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    names = dict(model.named_parameters())
    if not isinstance(model, PreTrainedModel):
        return {id(parameter): name for name, parameter in names.items()}
    marks = {name: torch.empty_like(parameter, device="meta") for name, parameter in names.items()}
    saved = {id(mark): name for name, mark in revert_weight_conversion(model, marks).items()}
    return {id(parameter): saved.get(id(marks[name]), name) for name, parameter in names.items()}


def saved_names(model: nn.Module, name: str) -> tuple[str, ...]:
    """The names under which `save_pretrained` writes one parameter: several where it joins weights (experts)."""
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(model, PreTrainedModel):
        return (name,)
    mark = torch.empty_like(model.get_parameter(name), device="meta")
    return tuple(revert_weight_conversion(model, {name: mark}))


def conv1d() -> type[nn.Module]:
    """GPT-2's linear layer, whose weight is stored [in, out]."""
    from transformers.pytorch_utils import Conv1D

    kind: type[nn.Module] = Conv1D
    return kind
