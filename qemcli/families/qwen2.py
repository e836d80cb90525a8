"""Qwen2 (Yang et al. 2024) under the transformers library's names: Llama with biases on queries,
keys and values."""

from dataclasses import replace

from qemcli.families import llama

FAMILY = replace(
    llama.FAMILY,
    name="qwen2",
    types=("qwen2",),
    marks=(*llama.FAMILY.marks, "self_attn.q_proj.bias"),
)
