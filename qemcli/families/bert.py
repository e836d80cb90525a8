"""BERT (Devlin et al. 2019) under the transformers library's names: [out, in] storage,
post-norm."""

from qemcli.families._family import Family

FAMILY = Family(
    name="bert",
    types=("bert",),
    prefixes=("bert.", ""),
    block="encoder.layer.{}.",
    marks=("attention.self.query.weight", "attention.output.LayerNorm"),
    maps={
        "attention.self.query": ("(k d) r*", "query"),
        "attention.self.key": ("(k d) r*", "key"),
        "attention.self.value": ("(k e) r*", "value"),
        "attention.output.dense": ("r (k e)*", "out"),
        "attention.output.LayerNorm": ("r", "norm1"),
        "intermediate.dense": ("f r*", "up"),
        "output.dense": ("r f*", "down"),
        "output.LayerNorm": ("r", "norm2"),
    },
    before={
        "embeddings.word_embeddings": "v r",
        "embeddings.position_embeddings": "t r",
        "embeddings.token_type_embeddings": "s r",
        "embeddings.LayerNorm": "r",
    },
    after={
        "pooler.dense": "p r*",
        "cls.predictions.transform.dense": "r r*",  # its answers meet the tied embeddings
        "cls.predictions.transform.LayerNorm": "r",
        "cls.predictions.decoder": "v r*",
        "cls.predictions.bias": "v",
        "cls.seq_relationship": "y p*",
        "classifier": "y p*",
        "qa_outputs": "y r*",
    },
    head="cls.predictions.decoder",
    placement="post",
    passed={r"embeddings\.position_ids$": "the positions' numbers, not weights"},
)
