"""Families of transformers: recognised from names and config.json; what is refused, and how."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hub_kit import GPT2, LLAMA, gpt2, llama

from qemcli import registry
from qemcli.errors import InputError, UnsupportedError
from qemcli.families._config import CONFIG
from qemcli.families._recognition import UNPLACED, families, recognise
from qemcli.recognition import infer
from qemcli.spaces import Rotary, Transformer, small_transformer


def space_of(tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None, **stated: Any):
    shapes = {n: tuple(x.shape) for n, x in tensors.items()}
    said = {CONFIG: json.dumps(config)} if config is not None else {}
    found = infer(shapes, said, ordered=False, **stated)
    assert isinstance(found, Transformer)
    return found


@pytest.mark.parametrize("name", registry.names("families"))
def test_every_entry_is_sound(name: str) -> None:
    family = registry.load("families", name).FAMILY
    roles = {role for _, held in family.maps.values() for role in held.split()}
    assert {"query", "key", "value", "out", "up", "down"} <= roles
    assert family.name.replace("-", "_") == name
    assert all(any(mark.startswith(stem) for stem in family.maps) for mark in family.marks)


@pytest.mark.parametrize("prefix", ["transformer.", "", "module.transformer."])
def test_gpt2_with_and_without_prefix(prefix: str) -> None:
    space = space_of(gpt2(prefix), GPT2)
    assert (space.family, space.width, space.activation) == ("gpt2", 12, "gelu")
    assert space.heads == ((3, 1, 4, 4),) * 2
    assert space.size == sum(x.numel() for x in gpt2().values())
    assert str(space[f"{prefix}h.1.attn.c_attn.weight"]) == "r* (c k2 d2)"
    assert space.tied


def test_llama_groups_and_rotary_come_from_the_config() -> None:
    space = space_of(llama(), LLAMA)
    assert space.family == "llama"
    assert space.heads == ((2, 3, 4, 4),)
    assert (space.rotary, space.norm, space.gated) == (Rotary("half", 4), "rms", True)
    assert not space.tied
    read = space.read({n: x[None] for n, x in llama().items()})[0]
    assert read["query"].shape == (1, 2, 3, 12, 4)
    assert space_of(llama(), {**LLAMA, "partial_rotary_factor": 0.5}).rotary == Rotary("half", 2)


def test_biases_tell_qwen2_from_llama() -> None:
    assert space_of(llama(bias=True), heads=6).family == "qwen2"
    assert space_of(llama(), heads=6).family == "llama"


def test_the_reader_of_a_bare_file_asks_for_heads() -> None:
    with pytest.raises(InputError, match="a gpt2 network: no tensor says how many heads") as caught:
        space_of(gpt2())
    assert "--heads" in str(caught.value.hint)
    assert space_of(gpt2(), heads=3).heads[0] == (3, 1, 4, 4)
    assert space_of(gpt2(), GPT2, heads=4).heads[0] == (3, 1, 4, 4)  # the config says it
    with pytest.raises(InputError, match="5 heads do not share the 12 query rows of 'transfor"):
        space_of(gpt2(), heads=5)


def test_the_activation_that_is_stated_goes_before_the_config() -> None:
    assert space_of(gpt2(), GPT2, activation="relu").activation == "relu"
    assert space_of(gpt2(), {**GPT2, "activation_function": "quick_gelu"}).activation is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 4, "n_embd": 16}, "n_embd is 16, the tensors have 12"),
        ({"n_head": 5}, "5 heads do not share the 12 query rows"),
        ({"n_layer": 3}, "says 3 blocks, the tensors have 2"),
        ({"n_inner": 48}, "n_inner is 48, the tensors have 20"),
        ({"n_head": "three"}, "n_head is 'three', not a whole number"),
        ({"model_type": "bert"}, "says bert, but no tensor is called"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_named(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        space_of(gpt2(), {**GPT2, **change})


def test_groups_that_contradict_the_tensors_are_named() -> None:
    with pytest.raises(InputError, match="6 heads in 3 groups do not share the 8 key"):
        space_of(llama(), {**LLAMA, "num_key_value_heads": 3})
    with pytest.raises(InputError, match="6 heads of 8 do not share the 24 query rows"):
        space_of(llama(), {**LLAMA, "head_dim": 8})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bloom"}, "ALiBi"),
        ({"model_type": "t5"}, "relative position biases"),
        ({"model_type": "qwen3"}, "normalised queries and keys"),
        ({"model_type": "mixtral"}, "mixture of experts"),
        ({"model_type": "opt"}, "model_type 'opt' is none that qem knows"),
        ({"add_cross_attention": True}, "cross-attention"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"position_embedding_type": "relative_key"}, "relative position"),
    ],
)
def test_a_kind_that_is_not_acted_on_is_refused_in_one_line(change: dict, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        space_of(gpt2(), {**GPT2, **change})
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.0.self_attn.q_norm.weight", "normalised queries and keys"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "adapter"),
        ("model.layers.0.self_attn.sinks", "attention sinks"),
        ("model.layers.0.mlp.experts.0.up_proj.weight", "mixture of experts"),
        ("model.layers.0.extra.weight", "no part of a block that qem knows"),
    ],
)
def test_a_foreign_tensor_of_a_block_is_refused(name: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        space_of({**llama(), name: torch.ones(4)}, LLAMA)
    assert name in caught.value.message


def test_what_has_no_place_outside_the_blocks_is_skipped_with_its_reason() -> None:
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in (0, 1)}
    space = space_of({**gpt2(), **masks, "reward.weight": torch.ones(3, 12)}, GPT2)
    assert dict(space.skipped) == {
        **dict.fromkeys(masks, "the causal mask, not weights"),
        "reward.weight": UNPLACED,
    }


def test_a_block_that_lacks_a_map_is_named() -> None:
    tensors = gpt2()
    del tensors["transformer.h.1.mlp.c_proj.weight"]
    with pytest.raises(InputError, match=r"block 1 has no down among its tensors"):
        space_of(tensors, GPT2)


def test_the_small_transformer_is_what_its_constructor_says() -> None:
    said = small_transformer(12, 3, 20, 2, 4, (1, 4))
    shapes = {**said.shapes, "embedding.pos_embedding": (49, 12)}
    found = recognise(shapes, {}, heads=3)
    assert found == said
    assert dict(found.skipped) == {
        "embedding.pos_embedding": "fixed sinusoids of the positions, not weights"
    }
    text = small_transformer(12, 3, 20, 1, 4)
    assert recognise(text.shapes, {"config.n_attention_heads": 3}) == text


def test_every_family_has_marks_of_its_own() -> None:
    marks = [family.marks for family in families()]
    assert len(set(marks)) == len(marks)


def test_a_chain_stays_a_chain() -> None:
    assert recognise({"0.weight": (5, 3), "0.bias": (5,), "2.weight": (2, 5)}, {}) is None
