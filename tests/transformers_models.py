"""Models from transformers in small configurations, with random weights; nothing is downloaded.

Batches have the format of a tokenizer's or image processor's output, labels included, and are passed by keyword.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from real_model import BATCH, TOKENS, WORDS, Inputs, RealModel
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _ids() -> Tensor:
    return torch.randint(5, WORDS, (BATCH, TOKENS))


def _causal() -> Mapping[str, Tensor]:
    ids = _ids()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _padded() -> Mapping[str, Tensor]:
    """The last two tokens of the last sequence are padding, whose labels are ignored."""
    ids = _ids()
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _sentences() -> Mapping[str, Tensor]:
    return {**_padded(), "labels": _classes()}


def _classes() -> Tensor:
    return torch.arange(BATCH) % 2


def _images() -> Mapping[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32), "labels": _classes()}


def _own(output: Any) -> Tensor:
    """The loss that the model itself computes from labels."""
    loss: Tensor = output.loss
    return loss


def _hf(model: str, task: str, inputs: Inputs = _causal, name: str = "", config: str = "", **options: Any) -> RealModel:
    """`transformers.{model}{task}`, built from its configuration with `options`."""

    def build() -> nn.Module:
        import transformers  # seconds, so not before it is needed

        settings = getattr(transformers, config or f"{model}Config")(**options)
        module: nn.Module = getattr(transformers, model + task)(settings)
        return module

    return RealModel(f"transformers.{name or model}", build, inputs, _own)


_LM, _MLM, _S2S, _CLS = "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "ForImageClassification"
_WORDS: dict[str, Any] = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WIDTH: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}
_TEXT = {**_WORDS, **_WIDTH, "max_position_embeddings": 20}
_HEADS8 = {**_TEXT, "hidden_size": 32}
_GROUPED = {**_HEADS8, "num_key_value_heads": 2, "head_dim": 8}
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2}
_T5: dict[str, Any] = {**_WORDS, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}
_START: dict[str, Any] = {"decoder_start_token_id": 0}
_N: dict[str, Any] = {**_WORDS, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 16}
_BART: dict[str, Any] = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 16,
    **_WORDS,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
_PICTURE: dict[str, Any] = {**_WIDTH, "image_size": 32, "patch_size": 8}
TRANSFORMERS = (
    _hf("GPT2", "LMHeadModel", **_N),
    _hf("GPT2", "LMHeadModel", name="GPT2 eager", attn_implementation="eager", **_N),
    _hf("GPTNeo", _LM, attention_types=[[["global", "local"], 1]], window_size=4, num_layers=2, num_heads=4, **_TEXT),
    _hf("GPTNeoX", _LM, rotary_pct=0.5, **_HEADS8),
    _hf("GPTJ", _LM, **(_N | {"n_embd": 32}), rotary_dim=4),
    _hf("OPT", _LM, ffn_dim=40, word_embed_proj_dim=24, **_TEXT),
    _hf("Bloom", _LM, n_layer=2, n_head=4, **_TEXT),
    _hf("Mpt", _LM, d_model=24, n_heads=4, n_layers=2, max_seq_len=16, **_WORDS),
    _hf("Falcon", _LM, **_TEXT),
    _hf("Falcon", _LM, name="Falcon grouped", new_decoder_architecture=True, num_kv_heads=2, **_TEXT),
    _hf("Llama", _LM, **_GROUPED),
    _hf("Llama", _LM, name="Llama no cache", use_cache=False, **_GROUPED),
    _hf("Llama", _LM, name="Llama tied eager", tie_word_embeddings=True, attn_implementation="eager", **_GROUPED),
    _hf("Llama", "ForSequenceClassification", _sentences, name="Llama classifier", **_GROUPED),
    _hf("Mistral", _LM, _padded, sliding_window=4, **_GROUPED),
    _hf("Qwen2", _LM, **_GROUPED),
    _hf("Qwen3", _LM, **_GROUPED),
    _hf("Gemma2", _LM, **_GROUPED),
    _hf("Gemma3", _LM, config="Gemma3TextConfig", **_GROUPED),
    _hf("Phi", _LM, **_HEADS8),
    _hf("Phi3", _LM, **_GROUPED),
    _hf("Olmo2", _LM, **_GROUPED),
    _hf("Cohere", _LM, **_GROUPED),
    _hf("Mixtral", _LM, num_local_experts=4, **_EXPERTS),
    _hf("Mixtral", _LM, name="Mixtral batched", num_local_experts=4, experts_implementation="batched_mm", **_EXPERTS),
    _hf("Qwen2Moe", _LM, num_experts=4, moe_intermediate_size=12, shared_expert_intermediate_size=16, **_EXPERTS),
    _hf("GptOss", _LM, num_local_experts=4, **_EXPERTS),
    _hf(
        "DeepseekV3",
        _LM,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=12,
        q_lora_rank=12,
        kv_lora_rank=10,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        first_k_dense_replace=1,
        **_TEXT,
    ),
    _hf("Mamba", _LM, hidden_size=16, num_hidden_layers=2, state_size=4, **_WORDS),
    _hf(
        "Mamba2",
        _LM,
        hidden_size=16,
        num_hidden_layers=2,
        state_size=4,
        num_heads=4,
        head_dim=8,
        n_groups=2,
        chunk_size=4,
        **_WORDS,
    ),
    _hf("RecurrentGemma", _LM, attention_window_size=4, **(_TEXT | {"num_hidden_layers": 3})),
    _hf("Rwkv", _LM, attention_hidden_size=24, context_length=16, **_TEXT),
    _hf("Bert", _MLM, _padded, **_TEXT),
    _hf("Bert", "ForSequenceClassification", _sentences, name="Bert classifier", **_TEXT),
    _hf("Roberta", _MLM, _padded, **_TEXT),
    _hf(
        "DistilBert", _MLM, _padded, dim=24, n_layers=2, n_heads=4, hidden_dim=40, max_position_embeddings=16, **_WORDS
    ),
    _hf("Albert", _MLM, _padded, embedding_size=12, **_TEXT),
    _hf("Electra", _MLM, _padded, embedding_size=12, **_TEXT),
    _hf("DebertaV2", _MLM, _padded, relative_attention=True, pos_att_type=["p2c", "c2p"], **_TEXT),
    _hf("ModernBert", _MLM, _padded, cls_token_id=3, sep_token_id=4, **_TEXT),
    _hf("T5", _S2S, **_START, **_T5),
    _hf("T5", _S2S, name="T5 gated", feed_forward_proj="gated-gelu", tie_word_embeddings=False, **_START, **_T5),
    _hf("Bart", _S2S, **_BART),
    _hf(
        "Whisper",
        _S2S,
        lambda: {"input_features": torch.randn(BATCH, 8, 32), "labels": _ids()},
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **{key: value for key, value in _BART.items() if key not in {"max_position_embeddings", "forced_eos_token_id"}},
    ),
    _hf(
        "CLIP",
        "Model",
        lambda: {"input_ids": _ids(), "pixel_values": _images()["pixel_values"], "return_loss": True},
        text_config=_TEXT,
        vision_config=_PICTURE,
        projection_dim=10,
    ),
    _hf("ViT", _CLS, _images, **_PICTURE),
    _hf("Dinov2", _CLS, _images, mlp_ratio=2, **_PICTURE),
    _hf("ResNet", _CLS, _images, embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1]),
    _hf(
        "ViTMAE",
        "ForPreTraining",
        lambda: {"pixel_values": _images()["pixel_values"]},
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=20,
        **_PICTURE,
    ),
    _hf(
        "Segformer",
        "ForSemanticSegmentation",
        lambda: {"pixel_values": _images()["pixel_values"], "labels": torch.randint(0, 2, (BATCH, 32, 32))},
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=12,
        sr_ratios=[2, 2, 1, 1],
    ),
)

# Their forward passes depend on the values of tensors: selected experts, dropped layers, lengths of labels.
UNTRACED = (
    _hf(
        "SwitchTransformers",
        _S2S,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_decoder_layers=2,
        num_sparse_decoder_layers=1,
        **_START,
        **_T5,
    ),
    _hf(
        "Wav2Vec2",
        "ForCTC",
        lambda: {"input_values": torch.randn(BATCH, 400), "labels": torch.randint(5, WORDS, (BATCH, 3))},
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        **_WORDS,
        **_WIDTH,
    ),
)
