"""ViT (Dosovitskiy et al. 2021) under the transformers library's names: [out, in] storage,
pre-norm."""

from qemcli.families._family import Family

FAMILY = Family(
    name="vit",
    types=("vit",),
    prefixes=("vit.", ""),
    block="encoder.layer.{}.",
    marks=("attention.attention.query.weight", "layernorm_before"),
    maps={
        "layernorm_before": ("r", "norm1"),
        "attention.attention.query": ("(k d) r*", "query"),
        "attention.attention.key": ("(k d) r*", "key"),
        "attention.attention.value": ("(k e) r*", "value"),
        "attention.output.dense": ("r (k e)*", "out"),
        "layernorm_after": ("r", "norm2"),
        "intermediate.dense": ("f r*", "up"),
        "output.dense": ("r f*", "down"),
    },
    before={
        "embeddings.cls_token": "o o r",
        "embeddings.mask_token": "o o r",
        "embeddings.position_embeddings": "o t r",
        "embeddings.patch_embeddings.projection": "r x u w",
    },
    after={
        "layernorm": "r",
        "pooler.dense": "p r*",
        "classifier": "y p*",
    },
)
