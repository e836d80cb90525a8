"""GPT-NeoX and Pythia (Black et al. 2022) under the transformers library's names: query, key and
value of a head side by side, rotary positions on a part of each head, parallel blocks."""

from qemcli.families._family import Family

FAMILY = Family(
    name="gpt_neox",
    types=("gpt_neox",),
    prefixes=("gpt_neox.", ""),
    block="layers.{}.",
    marks=("attention.query_key_value.weight", "mlp.dense_h_to_4h.weight"),
    maps={
        "input_layernorm": ("r", "norm1"),
        "attention.query_key_value": ("(k c d) r*", "query key value"),
        "attention.dense": ("r (k e)*", "out"),
        "post_attention_layernorm": ("r", "norm2"),
        "mlp.dense_h_to_4h": ("f r*", "up"),
        "mlp.dense_4h_to_h": ("r f*", "down"),
    },
    before={"embed_in": "v r"},
    after={
        "final_layer_norm": "r",
        "embed_out": "v r*",
        "score": "y r*",
    },
    head="embed_out",
    pairing="half",
    rotated=0.25,
    passed={
        r"\.attention\.(masked_)?bias$": "the causal mask, not weights",
        r"rotary_emb\.inv_freq$": "the rotary frequencies, not weights",
    },
)
