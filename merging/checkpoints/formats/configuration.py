"""What of a `config.json` changes the function that weights compute, compared as transformers resolves it."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from merging.checkpoints.models import skeleton

IGNORED = (
    "_*",
    "architectures",
    "auto_map",
    "transformers_version",
    "transformers.js_config",
    "*name_or_path*",
    "*_version",
    "torch_dtype",
    "dtype",
    "use_bfloat16",
    "torchscript",
    "return_dict*",
    "output_*",
    "use_cache",
    "use_return_dict",
    "*attn_implementation*",
    "gradient_checkpointing*",
    "pretraining_tp",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "finetuning_task",
    "task_specific_params",
    "tokenizer_class",
    "processor_class",
    "prefix",
    "vocab_size",
    "*_vocab_size",
    "*_token_id",
    "*_token_ids",
    "*_token_index",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_decoder_ids",
    "model_max_length",
    "*dropout*",
    "*_pdrop",
    "*layerdrop*",
    "*drop_rate*",
    "*drop_path*",
    "initializer_*",
    "*_initializer_*",
    "init_*",
    "*_init_value",
    "*_init_std",
    "*loss*",
    "*aux_coef*",
    "router_jitter_noise",
    "*z_loss*",
    "mask_time_*",
    "mask_feature_*",
    "apply_spec_augment",
    "pruned_heads",
    "quantization_config",
    "do_sample",
    "early_stopping",
    "num_beams",
    "num_beam_groups",
    "diversity_penalty",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "num_return_sequences",
    "max_length",
    "min_length",
    "max_new_tokens",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "renormalize_logits",
    "generation_config",
)
"""Fields that change nothing of what a model with given weights computes when it is evaluated: names, labels, dtype, training,
generation, numbers of tokens (whose rows are compared as shapes)."""
OFF_WHEN_ABSENT = (
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "logit_scale",
    "final_logit_softcapping",
    "attn_logit_softcapping",
    "attention_multiplier",
    "residual_multiplier",
    "embedding_multiplier",
    "logits_scaling",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "alibi",
)
"""Fields that, of an architecture that transformers does not know, mean something else than their absence does."""
POSITIONS = "max_position_embeddings"
POSITIONS_MATTER = ("dynamic", "longrope", "yarn", "su")
"""Kinds of rotary embeddings that depend on the number of positions; learnt ones are compared as shapes."""
WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers")
"""Fields that nothing depends on where no layer is said to attend to a window."""
SAME = ({"silu", "swish"}, {"gelu_new", "gelu_pytorch_tanh", "gelu_fast"})
"""Names of one activation."""
LANGUAGE_HEADS = (
    "LMHeadModel",
    "ForCausalLM",
    "ForConditionalGeneration",
    "ForMaskedLM",
    "ForPreTraining",
    "Seq2SeqLM",
)
"""How the names of architectures end that have an output embedding, so that it matters whether that is tied."""
OF_HEADS = ("classifier_", "summary_")
"""How fields begin that say how a head reads its backbone: they matter where both have the same one."""
SANE = 1 << 24
"""A number above which no list is made of so many layers."""

Difference = tuple[str, Any, Any]
"""(field, its value in the first configuration, in the second); None where it is absent."""


def function_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `config.json` that may change what its weights compute, as they stand there."""
    return {
        key: function_of(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not _ignored(key)
    }


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """Fields in which two configurations make different functions of the same weights.

    They are compared as the configuration classes of transformers resolve them: with defaults, and with what older
    versions wrote in other words (`rope_theta`). No code of a checkpoint's own is run; an architecture that transformers
    does not know is compared as its files stand.
    """
    if _plain(function_of(first)) == _plain(function_of(second)):
        return []
    if first.get("model_type") != second.get("model_type"):
        return [("model_type", first.get("model_type"), second.get("model_type"))]
    ties = any(
        str(name).endswith(LANGUAGE_HEADS) for config in (first, second) for name in config.get("architectures") or []
    )
    resolved = [resolved_config(config) for config in (first, second)]
    own_code = "auto_map" in first or "auto_map" in second
    if resolved[0] is None or resolved[1] is None:
        entries = list(_raw(function_of(first), function_of(second)))
    else:
        declared = None if own_code else _declared(str(first["model_type"]))
        entries = list(_compared(resolved[0], resolved[1], declared, ""))
    one, other = (config.get("architectures") for config in (first, second))
    heads = one == other and any("Classification" in str(name) for name in one or [])
    ends = [(entry, entry[0].rpartition(".")[2]) for entry in entries]
    return [
        entry
        for entry, end in ends
        if (ties or end != "tie_word_embeddings") and (heads or not end.startswith(OF_HEADS))
    ]


def _ignored(key: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in IGNORED)


def _plain(value: Any) -> Any:
    """A value without what is null, and without lists' types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(below) for key, below in value.items() if below is not None}
    return [_plain(below) for below in value] if isinstance(value, list | tuple) else value


def resolved_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A configuration as transformers builds it; None where it cannot."""
    if not _is_sane(config):
        return None
    try:
        with _quiet():
            return dict(skeleton.parsed(config).to_dict())
    except Exception:  # of whatever kind: the file is compared as it stands
        return None


@cache
def _declared(model_type: str) -> dict[str, Any] | None:
    """The fields that a configuration class knows, with their defaults; others are read by nobody."""
    try:
        with _quiet():
            from transformers import CONFIG_MAPPING

            return dict(CONFIG_MAPPING[model_type]().to_dict())
    except Exception:  # a class that cannot do without arguments
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' warnings about keys that it does not know off the screen."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _is_sane(config: Mapping[str, Any]) -> bool:
    return all(
        _is_sane(value) if isinstance(value, Mapping) else not (isinstance(value, int) and abs(value) > SANE)
        for key, value in config.items()
        if not _ignored(str(key))
    )


def _compared(
    first: Mapping[str, Any], second: Mapping[str, Any], declared: Mapping[str, Any] | None, place: str
) -> Iterator[Difference]:
    """The differences of two resolved configurations, or of two parts of them."""
    first, second = _completed(first), _completed(second)
    for key in {**first, **second}:
        if _ignored(key) or (declared is not None and key not in declared):
            continue
        if key == POSITIONS and not any(_depends_on_positions(config) for config in (first, second)):
            continue
        one, other = first.get(key), second.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            known = declared.get(key) if declared else None
            inner = known if key.endswith("config") and isinstance(known, Mapping) and known else None
            yield from _compared(one, other, inner, f"{place}{key}.")
        elif not _equal(one, other):
            yield f"{place}{key}", one, other


def _completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration with what modelling code puts in the place of nulls, and without a field's older name."""
    values = dict(config)
    if values.get("rope_type") is not None:
        values.pop("type", None)
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if isinstance(heads, int) and heads and isinstance(width, int):
        if values.get("head_dim") is None:
            values["head_dim"] = width // heads
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = heads
    layers = values.get("layer_types")
    if isinstance(layers, list | tuple) and not any("sliding" in str(layer) for layer in layers):
        values = {key: value for key, value in values.items() if key not in WINDOWS}
    if "n_inner" in values and values["n_inner"] is None and isinstance(values.get("n_embd"), int):
        values["n_inner"] = 4 * values["n_embd"]
    return values


def _depends_on_positions(config: Mapping[str, Any]) -> bool:
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, Mapping):
        return False
    kinds = [rope, *(below for below in rope.values() if isinstance(below, Mapping))]
    return any(kind.get("rope_type", kind.get("type")) in POSITIONS_MATTER for kind in kinds)


def _equal(one: Any, other: Any) -> bool:
    """Whether two values mean the same: numbers to float32's precision, activations by any of their names."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        if isinstance(one, bool) or isinstance(other, bool):
            return bool(one == other)
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other) or any(
        {one, other} <= names for names in SAME if isinstance(one, str) and isinstance(other, str)
    )


def _raw(first: Mapping[str, Any], second: Mapping[str, Any], place: str = "") -> Iterator[Difference]:
    """The same of two files as they stand: what is not there is the architecture's default, which nobody here knows."""
    first, second = _completed(first), _completed(second)
    for key in {**first, **second}:
        if key == POSITIONS and not any(_depends_on_positions(config) for config in (first, second)):
            continue
        one, other = first.get(key), second.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _raw(one, other, f"{place}{key}.")
        elif one is None or other is None:
            stated = other if one is None else one
            if key in OFF_WHEN_ABSENT and stated not in (None, False):
                yield f"{place}{key}", one, other
        elif not _equal(one, other):
            yield f"{place}{key}", one, other
