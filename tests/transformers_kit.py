"""Tiny random models of the transformers library, made from configs: no two widths are the same,
gains and biases are far from 1 and 0, and attention is far from uniform."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

with warnings.catch_warnings():  # of what the library imports, not of what it does
    warnings.simplefilter("ignore")
    import transformers
    from transformers import (
        BertConfig,
        GPT2Config,
        GPTNeoXConfig,
        LlamaConfig,
        Qwen2Config,
        ViTConfig,
    )

USUAL = {"num_hidden_layers": 2, "intermediate_size": 20, "vocab_size": 23}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
ROTARY = {**USUAL, "max_position_embeddings": 64, **IDS}
FAMILIES: dict[str, tuple[str, Any]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        lambda: GPT2Config(
            vocab_size=23, n_positions=11, n_embd=12, n_layer=2, n_head=3, n_inner=20, **IDS
        ),
    ),
    "bert": (
        "BertForMaskedLM",
        lambda: BertConfig(
            hidden_size=12, num_attention_heads=3, max_position_embeddings=11, **USUAL
        ),
    ),
    "vit": (
        "ViTForImageClassification",
        lambda: ViTConfig(
            hidden_size=12,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=20,
            image_size=8,
            patch_size=4,
            num_channels=2,
            num_labels=5,
        ),
    ),
    "llama": (
        "LlamaForCausalLM",
        lambda: LlamaConfig(
            hidden_size=18, num_attention_heads=6, num_key_value_heads=2, head_dim=4, **ROTARY
        ),
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        lambda: Qwen2Config(hidden_size=24, num_attention_heads=6, num_key_value_heads=2, **ROTARY),
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        lambda: GPTNeoXConfig(
            hidden_size=24,
            num_attention_heads=3,
            rotary_pct=0.5,
            **ROTARY,
        ),
    ),
}


def make(family: str, seed: int = 0, kind: str | None = None, **changes: Any) -> Any:
    """A model of the family with random weights; `changes` are settings of its config."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    name, config = FAMILIES[family]
    told = config()
    for key, value in changes.items():
        setattr(told, key, value)
    torch.manual_seed(seed)
    model = getattr(transformers, kind or name)(told).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, x in model.named_parameters():
        drawn = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        if x.dim() == 1:
            x.data = 0.4 * drawn + ("norm" in name.lower() or "ln_" in name) * name.endswith("t")
        else:
            x.data = drawn if "embed" in name else 1.5 * drawn / x.shape[-1] ** 0.5
    model.tie_weights()
    return model


def saved(
    folder: Path,
    family: str,
    dtype: torch.dtype = torch.float64,
    shard: str = "1GB",
    **changes: Any,
) -> Path:
    """The folder of such a model, as `save_pretrained` writes it."""
    make(family, **changes).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder
