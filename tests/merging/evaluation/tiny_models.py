"""Tiny models of the architecture families that people merge, as transformers' own configurations make them."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = TEXT | {"num_key_value_heads": 1, "head_dim": 8}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.3,
}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "init_std": 0.3,
}
MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
DEEPSEEK: dict[str, Any] = TEXT | {
    "num_key_value_heads": 2,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
LLAVA: dict[str, Any] = {
    "text_config": DECODER | {"model_type": "llama"},
    "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 8},
    "image_token_index": 60,
}


@dataclass(frozen=True)
class Family:
    """An architecture: its configuration, its class, and the automatic class that loads it."""

    config: str
    settings: dict[str, Any]
    model: str
    auto: str

    def make(self, seed: int = 0) -> nn.Module:
        """A model with random weights."""
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, self.model)(getattr(transformers, self.config)(**self.settings))
        return model.eval()

    def changed(self, seed: int) -> nn.Module:
        """As `make`, and as if fine-tuned."""
        model = self.make()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model

    def output(self, model: Any) -> Tensor:
        """What a model makes of some inputs."""
        torch.manual_seed(7)
        ids = torch.randint(3, 58, (3, 9))
        pixels = torch.randn(3, 3, 8, 8, dtype=torch.float32).to(model.dtype)
        with torch.no_grad():
            if self.auto in ("AutoModelForImageClassification",):
                return model(pixel_values=pixels).logits
            if self.config == "CLIPConfig":
                return model(input_ids=ids, pixel_values=pixels).logits_per_image
            if self.auto == "AutoModelForSeq2SeqLM":
                return model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits
            return model(input_ids=ids).logits


LM, CLASSES = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
FAMILIES: dict[str, Family] = {
    "bert": Family("BertConfig", TEXT, "BertForSequenceClassification", CLASSES),
    "bert_mlm": Family("BertConfig", TEXT, "BertForMaskedLM", "AutoModelForMaskedLM"),
    "roberta": Family("RobertaConfig", TEXT, "RobertaForSequenceClassification", CLASSES),
    "distilbert": Family(
        "DistilBertConfig",
        {"vocab_size": 64, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32},
        "DistilBertForSequenceClassification",
        CLASSES,
    ),
    "deberta_v2": Family(
        "DebertaV2Config",
        TEXT
        | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "share_att_key": True},
        "DebertaV2ForSequenceClassification",
        CLASSES,
    ),
    "modernbert": Family(
        "ModernBertConfig",
        TEXT | {"cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2},
        "ModernBertForMaskedLM",
        "AutoModelForMaskedLM",
    ),
    "gpt2": Family(
        "GPT2Config",
        {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.3},
        "GPT2LMHeadModel",
        LM,
    ),
    "llama": Family("LlamaConfig", DECODER, "LlamaForCausalLM", LM),
    "llama_tied": Family("LlamaConfig", DECODER | {"tie_word_embeddings": True}, "LlamaForCausalLM", LM),
    "qwen2": Family("Qwen2Config", DECODER, "Qwen2ForCausalLM", LM),
    "qwen3": Family("Qwen3Config", DECODER, "Qwen3ForCausalLM", LM),
    "gemma2": Family("Gemma2Config", DECODER, "Gemma2ForCausalLM", LM),
    "phi3": Family("Phi3Config", TEXT | {"num_key_value_heads": 1}, "Phi3ForCausalLM", LM),
    "mixtral": Family("MixtralConfig", DECODER | {"num_local_experts": 4}, "MixtralForCausalLM", LM),
    "qwen2_moe": Family(
        "Qwen2MoeConfig", DECODER | MOE | {"shared_expert_intermediate_size": 8}, "Qwen2MoeForCausalLM", LM
    ),
    "qwen3_moe": Family("Qwen3MoeConfig", DECODER | MOE, "Qwen3MoeForCausalLM", LM),
    "deepseek_v3": Family("DeepseekV3Config", DEEPSEEK, "DeepseekV3ForCausalLM", LM),
    "gpt_oss": Family(
        "GptOssConfig",
        DECODER | {"num_local_experts": 4, "layer_types": ["full_attention"] * 2},
        "GptOssForCausalLM",
        LM,
    ),
    "mamba": Family(
        "MambaConfig",
        {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.3},
        "MambaForCausalLM",
        LM,
    ),
    "mamba2": Family(  # whose config.json has an infinity
        "Mamba2Config",
        {
            "vocab_size": 64,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_heads": 4,
            "head_dim": 8,
            "state_size": 4,
            "n_groups": 1,
        },
        "Mamba2ForCausalLM",
        LM,
    ),
    "t5": Family(
        "T5Config",
        {
            "vocab_size": 64,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 1,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        "T5ForConditionalGeneration",
        "AutoModelForSeq2SeqLM",
    ),
    "bart": Family("BartConfig", SEQ2SEQ, "BartForConditionalGeneration", "AutoModelForSeq2SeqLM"),
    "vit": Family("ViTConfig", VISION, "ViTForImageClassification", "AutoModelForImageClassification"),
    "dinov2": Family(
        "Dinov2Config",
        {k: v for k, v in VISION.items() if k != "intermediate_size"},
        "Dinov2ForImageClassification",
        "AutoModelForImageClassification",
    ),
    "resnet": Family(
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        "ResNetForImageClassification",
        "AutoModelForImageClassification",
    ),
    "clip": Family(
        "CLIPConfig", {"text_config": TEXT, "vision_config": VISION, "projection_dim": 8}, "CLIPModel", "AutoModel"
    ),
    "llava": Family("LlavaConfig", LLAVA, "LlavaForConditionalGeneration", "AutoModelForImageTextToText"),
}
