"""Two configurations are told apart if, and only if, transformers computes something else with the same weights."""

import subprocess
import sys

import pytest
import torch
import transformers

from merging.checkpoints.formats.configuration import differences, function_of

TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.5}
DECODER = {**TINY, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.5}
MODELS = {
    "llama": ("LlamaForCausalLM", {**DECODER, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", {**DECODER, "head_dim": 8, "sliding_window": None}),
    "mixtral": ("MixtralForCausalLM", {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2ForCausalLM", DECODER),
    "gemma2": ("Gemma2ForCausalLM", {**DECODER, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "cohere": ("CohereForCausalLM", DECODER),
    "phi3": ("Phi3ForCausalLM", {**DECODER, "pad_token_id": 0}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "bert": ("BertModel", {**TINY, "intermediate_size": 48, "max_position_embeddings": 64}),
}
ABSENT = object()
CASES = [
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, True),
    ("llama", {"rope_parameters": ABSENT, "rope_theta": 1e6}, True),
    ("llama", {"rope_parameters": ABSENT, "rope_theta": 10000}, False),
    ("llama", {"rope_parameters": ABSENT, "rope_scaling": {"type": "linear", "factor": 8.0}}, True),
    ("llama", {"rope_parameters": ABSENT, "rope_scaling": None}, False),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}}, True),
    ("llama", {"head_dim": None}, False),
    ("llama", {"head_dim": ABSENT}, False),
    ("llama", {"rms_norm_eps": 1e-1}, True),
    ("llama", {"hidden_act": "gelu"}, True),
    ("llama", {"hidden_act": "swish"}, False),
    ("llama", {"max_position_embeddings": 128, "attention_dropout": 0.5, "bos_token_id": 7, "use_cache": False}, False),
    (
        "llama",
        {"torch_dtype": "float32", "unsloth_fixed": True, "transformers_version": "4.1", "id2label": {"0": "a"}},
        False,
    ),
    ("llama", {"rms_norm_eps": 9.999999974752427e-07}, False),
    ("mistral", {"sliding_window": 4}, True),
    ("mixtral", {"num_experts_per_tok": 4}, True),
    ("mixtral", {"router_aux_loss_coef": 0.5, "output_router_logits": True}, False),
    ("qwen2", {"head_dim": 8}, False),
    ("qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0, "layer_types": ABSENT}, True),
    ("qwen2", {"sliding_window": 4, "use_sliding_window": True}, False),
    ("qwen2", {"sliding_window": 4, "use_sliding_window": False}, False),
    ("gemma2", {"query_pre_attn_scalar": 64}, True),
    ("gemma2", {"attn_logit_softcapping": 1.0}, True),
    ("gemma2", {"final_logit_softcapping": 1.0}, True),
    ("cohere", {"logit_scale": 0.5}, True),
    ("phi3", {"partial_rotary_factor": 0.5, "rope_parameters": ABSENT}, True),
    ("gpt2", {"activation_function": "relu"}, True),
    ("gpt2", {"activation_function": "gelu_pytorch_tanh"}, False),
    ("gpt2", {"layer_norm_epsilon": 1e-1}, True),
    ("gpt2", {"n_inner": 128}, False),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, True),
    ("gpt2", {"task_specific_params": {"x": {"top_k": 1}}, "embd_pdrop": 0.5, "architectures": ["GPT2Model"]}, False),
    ("bert", {"layer_norm_eps": 1e-1}, True),
    ("bert", {"is_decoder": True}, True),
    ("bert", {"tie_word_embeddings": False, "hidden_dropout_prob": 0.5, "classifier_dropout": 0.5}, False),
]


@pytest.mark.parametrize(("kind", "change", "differs"), CASES)
def test_configurations_differ_where_transformers_computes_otherwise(kind, change, differs):
    name, settings = MODELS[kind]
    build = getattr(transformers, name)
    torch.manual_seed(0)
    model = build(transformers.CONFIG_MAPPING[kind](**settings)).eval()
    first = model.config.to_diff_dict() | {"architectures": [name], "model_type": kind}
    second = {key: value for key, value in (first | change).items() if value is not ABSENT}
    other = build(transformers.CONFIG_MAPPING[kind].from_dict(dict(second))).eval()
    other.load_state_dict(model.state_dict())
    ids = torch.arange(24).reshape(1, -1) % 60
    with torch.no_grad():
        outputs = [
            run(input_ids=ids, output_router_logits=False)[0] if kind == "mixtral" else run(input_ids=ids)[0]
            for run in (model, other)
        ]
    assert torch.allclose(*outputs, atol=1e-5) != differs, "the case itself"
    assert bool(differences(first, second)) == differs
    assert bool(differences(second, first)) == differs
    assert differences(second, second) == []


def test_configurations_within_configurations_are_compared_too():
    config = transformers.CLIPConfig(text_config={"hidden_act": "gelu"}).to_dict()
    other = config | {"vision_config": config["vision_config"] | {"layer_norm_eps": 1e-3, "attention_dropout": 0.5}}
    assert differences(config, other) == [("vision_config.layer_norm_eps", 1e-5, 1e-3)]


def test_an_architecture_that_transformers_does_not_know_is_compared_as_its_file_stands():
    own = {"model_type": "nobody-s", "auto_map": {"AutoModel": "x.Y"}, "eps": 1e-5, "hidden_size": 32}
    assert differences(own, own | {"eps": 1e-3}) == [("eps", 1e-5, 1e-3)]
    assert differences(own, own | {"auto_map": {}, "torch_dtype": "float16", "new_default": 3}) == []
    assert differences(own, own | {"rope_scaling": {"factor": 2}}) == [("rope_scaling", None, {"factor": 2})]
    heads = own | {"num_attention_heads": 4}
    assert differences(heads | {"head_dim": None}, heads | {"head_dim": 8}) == []
    assert differences(heads | {"head_dim": None}, heads | {"head_dim": 16}) == [("head_dim", 8, 16)]


def test_own_code_may_read_fields_that_transformers_does_not_know():
    config = {"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}
    assert differences(config, config | {"own_scale": 2.0}) == [("own_scale", None, 2.0)]


@pytest.mark.parametrize("wrong", [{"num_hidden_layers": 10**12}, {"hidden_act": 3}, {"num_attention_heads": "x"}])
def test_what_transformers_cannot_build_is_compared_as_it_stands(wrong):
    config = {"model_type": "qwen2", "num_hidden_layers": 2, "hidden_act": "silu", "num_attention_heads": 4}
    assert [field for field, *_ in differences(config, config | wrong)] == list(wrong)


def test_what_changes_the_function_is_kept_as_it_stands():
    config = {
        "model_type": "gpt2",
        "activation_function": "relu",
        "use_cache": True,
        "text_config": {"dtype": 1, "eps": 2},
    }
    assert function_of(config) == {"model_type": "gpt2", "activation_function": "relu", "text_config": {"eps": 2}}


def test_equal_files_are_compared_without_transformers():
    script = (
        "import sys; from merging.checkpoints.formats.configuration import differences as d; "
        "c = {'model_type': 'llama', 'x': None}; "
        "assert d(c, {'model_type': 'llama', 'use_cache': True}) == []; print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("architecture", "fits"), [("ModernBertForSequenceClassification", False), ("ModernBertForMaskedLM", True)]
)
def test_how_a_head_reads_its_backbone_matters_where_both_have_it(architecture, fits):
    first = {"model_type": "modernbert", "architectures": [architecture]}
    assert not differences(first, first | {"classifier_pooling": "cls"})
    result = differences(first, first | {"classifier_pooling": "mean"})
    assert [field for field, _, _ in result] == ([] if fits else ["classifier_pooling"])
    assert not differences(first, {**first, "architectures": ["ModernBertModel"], "classifier_pooling": "mean"})
