"""Llama (Touvron et al. 2023) and Mistral under the transformers library's names: grouped queries,
rotary positions in halves, SwiGLU, RMSNorm."""

from qemcli.families._family import Family

FAMILY = Family(
    name="llama",
    types=("llama", "mistral"),
    prefixes=("model.", ""),
    block="layers.{}.",
    marks=("self_attn.q_proj.weight", "mlp.gate_proj.weight", "post_attention_layernorm"),
    maps={
        "input_layernorm": ("r", "norm1"),
        "self_attn.q_proj": ("(k q d) r*", "query"),
        "self_attn.k_proj": ("(k d) r*", "key"),
        "self_attn.v_proj": ("(k e) r*", "value"),
        "self_attn.o_proj": ("r (k q e)*", "out"),
        "post_attention_layernorm": ("r", "norm2"),
        "mlp.gate_proj": ("f r*", "gate"),
        "mlp.up_proj": ("f r*", "up"),
        "mlp.down_proj": ("r f*", "down"),
    },
    before={"embed_tokens": "v r"},
    after={
        "norm": "r",
        "lm_head": "v r*",
        "score": "y r*",
        "qa_outputs": "y r*",
    },
    head="lm_head",
    norm="rms",
    pairing="half",
    passed={r"rotary_emb\.inv_freq$": "the rotary frequencies, not weights"},
)
