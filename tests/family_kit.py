"""The weight spaces of tiny transformers of every family, recognised from names and shapes."""

from __future__ import annotations

import json
from typing import Any

from hub_kit import GPT2, LLAMA, gpt2, llama

from qemcli.families._config import CONFIG
from qemcli.recognition import infer
from qemcli.spaces import Transformer

Shapes = dict[str, tuple[int, ...]]


def _both(shapes: Shapes) -> Shapes:
    """The weights with a bias each."""
    biases = {n[: -len("weight")] + "bias": s[:1] for n, s in shapes.items() if "weight" in n}
    return {**shapes, **biases}


def bert() -> Shapes:
    """Width 6, 3 heads, 5 neurons, 1 block, answers that share the embedding."""
    at = "bert.encoder.layer.0."
    inner = {
        **{f"{at}attention.self.{n}.weight": (6, 6) for n in ("query", "key", "value")},
        f"{at}attention.output.dense.weight": (6, 6),
        f"{at}attention.output.LayerNorm.weight": (6,),
        f"{at}intermediate.dense.weight": (5, 6),
        f"{at}output.dense.weight": (6, 5),
        f"{at}output.LayerNorm.weight": (6,),
        "bert.embeddings.LayerNorm.weight": (6,),
        "cls.predictions.transform.dense.weight": (6, 6),
        "cls.predictions.transform.LayerNorm.weight": (6,),
    }
    words = {"word": 7, "position": 4, "token_type": 2}
    tables = {f"bert.embeddings.{n}_embeddings.weight": (s, 6) for n, s in words.items()}
    return {**_both(inner), **tables, "cls.predictions.bias": (7,)}


def vit() -> Shapes:
    """Width 6, 2 heads, 5 neurons, 2 blocks, patches of 2 x 3 pixels of 2 channels."""
    inner: Shapes = {"vit.embeddings.patch_embeddings.projection.weight": (6, 2, 2, 3)}
    for i in range(2):
        at = f"vit.encoder.layer.{i}."
        inner |= {
            **{f"{at}attention.attention.{n}.weight": (6, 6) for n in ("query", "key", "value")},
            f"{at}attention.output.dense.weight": (6, 6),
            f"{at}layernorm_before.weight": (6,),
            f"{at}layernorm_after.weight": (6,),
            f"{at}intermediate.dense.weight": (5, 6),
            f"{at}output.dense.weight": (6, 5),
        }
    inner |= {"vit.layernorm.weight": (6,), "classifier.weight": (3, 6)}
    tables = {
        "vit.embeddings.cls_token": (1, 1, 6),
        "vit.embeddings.position_embeddings": (1, 4, 6),
    }
    return {**_both(inner), **tables}


def gpt_neox() -> Shapes:
    """Width 8, 2 heads, 5 neurons, 2 parallel blocks."""
    inner: Shapes = {"gpt_neox.final_layer_norm.weight": (8,)}
    for i in range(2):
        at = f"gpt_neox.layers.{i}."
        inner |= {
            f"{at}input_layernorm.weight": (8,),
            f"{at}attention.query_key_value.weight": (24, 8),
            f"{at}attention.dense.weight": (8, 8),
            f"{at}post_attention_layernorm.weight": (8,),
            f"{at}mlp.dense_h_to_4h.weight": (5, 8),
            f"{at}mlp.dense_4h_to_h.weight": (8, 5),
        }
    ends = {"gpt_neox.embed_in.weight": (7, 8), "embed_out.weight": (7, 8)}
    return {**_both(inner), **ends}


NEOX = {
    "model_type": "gpt_neox", "num_attention_heads": 2, "rotary_pct": 0.5, "hidden_act": "gelu",
    "use_parallel_residual": True,
}  # fmt: skip


def families() -> dict[str, Transformer]:
    """One weight space a family."""
    qwen2 = {**LLAMA, "model_type": "qwen2"}
    given: dict[str, tuple[Shapes, dict[str, Any]]] = {
        "gpt2": (_shapes(gpt2(blocks=1)), {**GPT2, "n_layer": 1}),
        "bert": (bert(), {"model_type": "bert", "num_attention_heads": 3, "hidden_act": "gelu"}),
        "vit": (vit(), {"model_type": "vit", "num_attention_heads": 2, "hidden_act": "gelu"}),
        "llama": (_shapes(llama()), LLAMA),
        "qwen2": (_shapes(llama(bias=True)), qwen2),
        "gpt_neox": (gpt_neox(), NEOX),
    }
    found = {}
    for name, (shapes, config) in given.items():
        space = infer(shapes, {CONFIG: json.dumps(config)}, ordered=False)
        assert isinstance(space, Transformer)
        assert not space.skipped
        found[name] = space
    return found


def _shapes(tensors: dict[str, Any]) -> Shapes:
    return {name: tuple(x.shape) for name, x in tensors.items()}
