"""What tests of transformers' layers share: a space of distinct widths, weights, boosted layers."""

import torch

from qemcli.architectures import transformer_nfn
from qemcli.spaces import Block, Place, Rotary, Style, Transformer, parse

WIDTH, GROUPS, QUERIES, KEYS, VALUES, NEURONS = 7, 2, 1, 3, 4, 5
BIASES = ("query_bias", "key_bias", "value_bias", "out_bias")


def space(
    queries: int = QUERIES,
    biases: bool = False,
    rotary: Rotary = Rotary(),
    keys: int = KEYS,
    blocks: int = 2,
    activation: str = "relu",
    family: str = "small-transformer",
) -> Transformer:
    """Blocks without residual sums and a classifier of three neurons and two outputs; every width
    is another number."""
    tensors, found = [], []
    for i in range(1, blocks + 1):
        heads = (GROUPS, queries, keys)
        axes = {
            "query": (f"(k{i} q{i} d{i}) r{i - 1}*", (*heads, WIDTH)),
            "query_bias": (f"(k{i} q{i} d{i})", heads),
            "key": (f"(k{i} d{i}) r{i - 1}*", (GROUPS, keys, WIDTH)),
            "key_bias": (f"(k{i} d{i})", (GROUPS, keys)),
            "value": (f"(k{i} e{i}) r{i - 1}*", (GROUPS, VALUES, WIDTH)),
            "value_bias": (f"(k{i} e{i})", (GROUPS, VALUES)),
            "out": (f"m{i} (k{i} q{i} e{i})*", (WIDTH, GROUPS, queries, VALUES)),
            "out_bias": (f"m{i}", (WIDTH,)),
            "up": (f"f{i} m{i}*", (NEURONS, WIDTH)),
            "up_bias": (f"f{i}", (NEURONS,)),
            "down": (f"r{i} f{i}*", (WIDTH, NEURONS)),
            "down_bias": (f"r{i}", (WIDTH,)),
        }
        kept = {r: a for r, a in axes.items() if biases or r not in BIASES}
        tensors += [parse(f"{i}.{role}", *where) for role, where in kept.items()]
        found.append(Block(tuple((role, Place(f"{i}.{role}")) for role in kept)))
    tensors += [
        parse("classifier.1", f"h1 r{blocks}*", (3, WIDTH)),
        parse("classifier.1b", "h1", (3,)),
        parse("classifier.2", "y h1*", (2, 3)),
        parse("classifier.2b", "y", (2,)),
    ]
    style = Style(activation, placement="plain", rotary=rotary)
    return Transformer(family, tuple(tensors), tuple(found), style)


def draw(space: Transformer, batch: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    return space.unflatten(torch.randn(batch, space.size, generator=rng, dtype=torch.float64) * 0.7)


def model(space: Transformer, **config: object) -> transformer_nfn.Model:
    """In float64, every parameter drawn anew so that all terms weigh alike: at the published init
    attention is a thousandth of the biases, and no test would notice it."""
    torch.manual_seed(0)
    config = {"channels": (4,), "init": "official", **config}
    if config.get("rank"):
        config["init"] = "unit"
    made = transformer_nfn.Model(space, transformer_nfn.Config(**config)).double().eval()
    torch.manual_seed(1)
    for layer in (*made.layers, made.invariant):
        if hasattr(layer, "reset"):
            layer.reset()
    return made
