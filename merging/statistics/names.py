"""The name that a live model's parameter has in the checkpoint, which is not always its name in the model."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def checkpoint_names(model: nn.Module) -> dict[int, str]:
    """`id` of each parameter → the name under which `save_pretrained` writes it.

    Of tied weights the first name counts, under which they are saved. Where transformers renames weights as
    it loads them (ViT), the renaming is reverted; where it joins several into one (experts), the model's own
    name is kept.
    """
    names = dict(model.named_parameters())
    if not isinstance(model, PreTrainedModel):
        return {id(parameter): name for name, parameter in names.items()}
    marks = {name: torch.empty_like(parameter, device="meta") for name, parameter in names.items()}
    saved = {id(mark): name for name, mark in revert_weight_conversion(model, marks).items()}
    return {id(parameter): saved.get(id(marks[name]), name) for name, parameter in names.items()}
