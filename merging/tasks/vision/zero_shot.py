"""Images in classes that are told by their names: models of images and texts (CLIP, SigLIP and their kin)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from merging.checkpoints.models.parameter_names import Loading
from merging.io import hashing
from merging.tasks.classification import ClassNames
from merging.tasks.head import load_model, load_tokenizer, tokenizer_identity
from merging.tasks.likelihood import Likelihood
from merging.tasks.task import Batch, Split, register
from merging.tasks.vision.image_classification import ImageClassification, ImageClassificationSettings

SIGLIP_LENGTH = 64
"""Tokens that transformers pads SigLIP's texts to, as it was trained."""
TOLERANCE = 1e-3
"""How far a logit may be from transformers' own, relative to the largest."""


class ZeroShotSettings(ImageClassificationSettings):
    """Images in classes whose names a text tower reads (CLIP, SigLIP): the image tower and its projection are what is merged.

    Keep the text tower out of the merge: `heads: [text_model.*, text_projection.*, logit_scale]`. A merge has the base's,
    and the base's embeddings of the classes' prompts are the head, computed once.
    """

    kind: Literal["zero_shot_image_classification"] = Field(  # type: ignore[assignment]
        "zero_shot_image_classification", description="zero_shot_image_classification."
    )
    labels: ClassNames = Field(description="Names of the classes, as the prompts have them.")
    template: str = Field("This is a photo of {}.", description="The prompt of a class; {} stands for its name.")

    @model_validator(mode="after")
    def _one_class_of_several(self) -> "ZeroShotSettings":
        if len(self.labels) < 2:
            raise ValueError("`labels` names one class: at least two are needed to choose from")
        if self.problem_type not in (None, "single_label_classification"):
            raise ValueError("`problem_type`: prompts are compared with an image to choose one of them")
        if "{}" not in self.template:
            raise ValueError("`template`: all classes have the same prompt; let {} stand for the class's name")
        return self

    @property
    def prompts(self) -> list[str]:
        """Each class's prompt."""
        return [self.template.replace("{}", name) for name in self.labels]


@dataclass(frozen=True)
class TextHead:
    """The classes as directions, and what makes logits of cosines.

    Args:
        embeddings: Unit vectors of the prompts [C, D].
        scale: What a cosine is multiplied by.
        bias: What is added then.
    """

    embeddings: Tensor
    scale: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Of image features [N, D]: [N, C]."""
        unit = features / features.norm(dim=-1, keepdim=True)
        embeddings, scale, bias = (value.to(unit) for value in (self.embeddings, self.scale, self.bias))
        logits: Tensor = unit @ embeddings.T * scale + bias
        return logits


class ZeroShotImageClassification(ImageClassification):
    """An image classification task whose classes are prompts; see `Task`."""

    kind: ClassVar[str] = "zero_shot_image_classification"
    model_class: ClassVar[str] = "AutoModelForZeroShotImageClassification"
    settings: ZeroShotSettings

    def check(self) -> list[str]:
        """As for images, and whether the prompts fit the text tower; see `Task.check`."""
        notes = super().check()
        self.blank_model()
        _ = self._prompts
        return notes

    @property
    def has_ensembles(self) -> bool:
        """What is read of these models are features, which several have no mean of; see `Task.has_ensembles`."""
        return False

    @cached_property
    def classes(self) -> Sequence[str]:
        """Names of the classes; see `FileTask.classes`."""
        return self.settings.labels

    @cached_property
    def outputs(self) -> Likelihood:
        """One class an image; see `Classifier.outputs`."""
        return "categorical"

    def blank_model(self) -> tuple[nn.Module, Loading]:
        """Without the text tower, which no image's score depends on; see `Task.blank_model`.

        Raises:
            TaskError: The model gives no features of images.
        """
        model, loading = super().blank_model()
        unused = self._unused(model)
        sources = [name for each in loading.conversions if each.target in unused for name in each.sources]
        return model, replace(loading, homeless=[*loading.homeless, *sources])

    def data_fingerprint(self, split: Split) -> str:
        """Content hash of the images, the classes' prompts, and the tokenizer."""
        prepared = [super().data_fingerprint(split), self.settings.prompts, tokenizer_identity(self._tokenizer)]
        return hashing.fingerprint(prepared)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scaled cosines of images and classes [N, C]; see `Task.logits`."""
        return self._head.logits(_pooled(self._features(model, batch.inputs)))

    def representation(self, model: nn.Module, batch: Batch) -> Tensor:
        """The image tower's last hidden states [N, S, D]; see `Task.representation`."""
        states: Tensor | None = getattr(self._features(model, batch.inputs), "last_hidden_state", None)
        if states is None:
            raise self.error(f"{type(model).__name__} does not show the hidden states of its image tower")
        return states if states.dim() == 3 else states.flatten(2).transpose(1, 2)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.base or self.head, self.base)

    @cached_property
    def _prompts(self) -> dict[str, Tensor]:
        """The classes' prompts as the text tower reads them, padded as transformers' own pipeline pads them.

        Raises:
            TaskError: One is longer than the text tower reads.
        """
        model: Any = super().blank_model()[0]
        texts = self.settings.prompts
        text_config = getattr(model.config, "text_config", model.config)
        limit = min(
            int(getattr(text_config, "max_position_embeddings", self._tokenizer.model_max_length)),
            self._tokenizer.model_max_length,
        )
        for text in texts:
            if len(self._tokenizer(text)["input_ids"]) > limit:
                raise self.error(
                    f"the prompt {text[:100]!r} is longer than the {limit} tokens that the text tower reads"
                )
        if "siglip" in model.config.model_type:
            length = min(SIGLIP_LENGTH, limit)
            return dict(self._tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt"))
        return dict(self._tokenizer(texts, padding=True, return_tensors="pt"))

    @cached_property
    def _head(self) -> TextHead:
        """The base's embeddings of the prompts, and its scale and bias.

        Raises:
            TaskError: transformers' own logits of this model are no scaled cosines.
        """
        model: Any = load_model(self.base or self.head, self.model_class)
        images = torch.randn(2, *self.pixel_shape, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            output = model(**self._prompts, pixel_values=images)
            features = _pooled(self._features(model, {"pixel_values": images}))
        try:
            own = output.logits_per_image
            scale, bias = (getattr(model, name, None) for name in ("logit_scale", "logit_bias"))
            head = TextHead(
                (output.text_embeds / output.text_embeds.norm(dim=-1, keepdim=True)).clone(),
                torch.tensor(1.0) if scale is None else scale.detach().exp(),
                torch.tensor(0.0) if bias is None else bias.detach(),
            )
            matches = bool(((head.logits(features) - own).abs() <= TOLERANCE * own.abs().max()).all())
        except (AttributeError, RuntimeError) as error:
            raise self.error(f"{type(model).__name__} gives no embeddings to compare: {str(error)[:200]}") from error
        if not matches:
            raise self.error(
                f"transformers' own logits of {type(model).__name__} are no scaled cosines of its embeddings: judge it by a "
                "custom function"
            )
        return head

    def run(self, model: nn.Module, pixels: Tensor) -> None:
        """See `ImageClassification.run`."""
        with torch.no_grad():
            self._features(model, {"pixel_values": pixels})

    def _features(self, model: Any, inputs: Any) -> Any:
        if not hasattr(model, "get_image_features"):
            raise self.error(f"{type(model).__name__} gives no features of images: name a CLIP-like checkpoint")
        return model.get_image_features(**inputs)

    def _unused(self, model: nn.Module) -> set[str]:
        """The model's names of weights that image features do not depend on, found by differentiating without values."""
        parameters = dict(model.named_parameters())
        images = torch.empty(1, *self.pixel_shape, device="meta")
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            features = _pooled(self._features(model, {"pixel_values": images}))
            gradients = torch.autograd.grad(features.sum(), list(parameters.values()), allow_unused=True)
        return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None}


def _pooled(features: Any) -> Tensor:
    """The features [N, D] themselves, whichever way a version of transformers gives them."""
    pooled: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return pooled


register(ZeroShotImageClassification, ZeroShotSettings)
