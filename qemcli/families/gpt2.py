"""GPT-2 (Radford et al. 2019) under the transformers library's names: [in, out] storage, fused."""

from qemcli.families._family import Family

FAMILY = Family(
    name="gpt2",
    types=("gpt2",),
    prefixes=("transformer.", ""),
    block="h.{}.",
    marks=("attn.c_attn.weight", "mlp.c_fc.weight"),
    maps={
        "ln_1": ("r", "norm1"),
        "attn.c_attn": ("r* (c k d)", "query key value"),
        "attn.c_proj": ("(k e)* r", "out"),
        "ln_2": ("r", "norm2"),
        "mlp.c_fc": ("r* f", "up"),
        "mlp.c_proj": ("f* r", "down"),
    },
    before={"wte": "v r", "wpe": "t r"},
    after={"ln_f": "r", "lm_head": "v r*", "score": "y r*"},
    head="lm_head",
    config={
        "width": "n_embd", "blocks": "n_layer", "heads": "n_head", "ffn": "n_inner",
        "activation": "activation_function",
    },
    passed={r"\battn\.(masked_)?bias$": "the causal mask, not weights"},
)  # fmt: skip
