"""Checkpoint directories as the transformers library writes them, made by code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

SIZES = {"v": 19, "D": 12, "A": 20, "h": 3, "K": 1}


def gpt2(prefix: str = "transformer.", blocks: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """GPT-2 of width 12, 3 heads, 20 neurons."""
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}wte.weight": (19, 12)}
    shapes[f"{prefix}wpe.weight"] = (8, 12)
    for i in range(blocks):
        at = f"{prefix}h.{i}."
        shapes |= {f"{at}{n}.{p}": (12,) for n in ("ln_1", "ln_2") for p in ("weight", "bias")}
        shapes |= {f"{at}attn.c_attn.weight": (12, 36), f"{at}attn.c_attn.bias": (36,)}
        shapes |= {f"{at}attn.c_proj.weight": (12, 12), f"{at}attn.c_proj.bias": (12,)}
        shapes |= {f"{at}mlp.c_fc.weight": (12, 20), f"{at}mlp.c_fc.bias": (20,)}
        shapes |= {f"{at}mlp.c_proj.weight": (20, 12), f"{at}mlp.c_proj.bias": (12,)}
    shapes |= {f"{prefix}ln_f.weight": (12,), f"{prefix}ln_f.bias": (12,)}
    return draw(shapes, seed)


def llama(prefix: str = "model.", bias: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """One block of Llama, or Qwen2 with `bias`: width 12, 6 heads of 4 in 2 groups, 20 neurons."""
    at = f"{prefix}layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embed_tokens.weight": (19, 12),
        f"{at}input_layernorm.weight": (12,),
        f"{at}self_attn.q_proj.weight": (24, 12),
        f"{at}self_attn.k_proj.weight": (8, 12),
        f"{at}self_attn.v_proj.weight": (8, 12),
        f"{at}self_attn.o_proj.weight": (12, 24),
        f"{at}post_attention_layernorm.weight": (12,),
        f"{at}mlp.gate_proj.weight": (20, 12),
        f"{at}mlp.up_proj.weight": (20, 12),
        f"{at}mlp.down_proj.weight": (12, 20),
        f"{prefix}norm.weight": (12,),
        "lm_head.weight": (19, 12),
    }
    if bias:
        shapes |= {f"{at}self_attn.{n}_proj.bias": (r,) for n, r in (("q", 24), ("k", 8), ("v", 8))}
    return draw(shapes, seed)


GPT2: dict[str, Any] = {
    "model_type": "gpt2", "n_embd": 12, "n_head": 3, "n_layer": 2, "n_inner": 20,
    "activation_function": "gelu_new", "vocab_size": 19,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 12, "num_attention_heads": 6, "num_key_value_heads": 2,
    "num_hidden_layers": 1, "head_dim": 4, "intermediate_size": 20, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip


def draw(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {n: torch.randn(*s, generator=rng) for n, s in shapes.items()}


def write(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
    form: str = "model.safetensors",
) -> Path:
    """A checkpoint directory; torch.save's files where `form` is pytorch_model.bin."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    stem, suffix = form.split(".")
    save = torch.save if suffix == "bin" else save_file
    if shards == 1:
        save(dict(tensors), folder / form)
        return folder
    where: dict[str, str] = {}
    for i, part in enumerate(np.array_split(list(tensors), shards), start=1):
        name = f"{stem}-{i:05d}-of-{shards:05d}.{suffix}"
        where |= {str(n): name for n in part}
        save({str(n): tensors[str(n)] for n in part}, folder / name)
    (folder / f"{form}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder
