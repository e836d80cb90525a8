"""The Small Transformer Zoo's network (Tran et al. 2025, arXiv:2410.04209): no residual sums, norms
without parameters, attention without biases."""

from qemcli.families._family import Family
from qemcli.spaces import FROZEN

FAMILY = Family(
    name="small-transformer",
    block="encoder.{}.",
    marks=("attention.queries.weight", "attention.out_projection.weight", "fc1.weight"),
    maps={
        "attention.queries": ("(k d) r*", "query"),
        "attention.keys": ("(k d) r*", "key"),
        "attention.values": ("(k e) r*", "value"),
        "attention.out_projection": ("r (k e)*", "out"),
        "fc1": ("f r*", "up"),
        "fc2": ("r f*", "down"),
    },
    before={"embedding.conv1": "r x u w"},
    after={
        "classifier.fc1": "h1 r*",
        "classifier.fc2": "y h1*",
    },
    config={"width": "embed_dim", "heads": "n_attention_heads", "blocks": "n_layers"},
    placement="plain",
    activation="relu",
    passed={r"embedding\.pos_embedding$": FROZEN},
)
