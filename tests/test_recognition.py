"""The weight space is found whatever the tensors are called, or refused with the tensor's name."""

import itertools
import random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qemcli import recognition, spaces
from qemcli.errors import InputError, UnsupportedError, UsageError
from qemcli.functions import probe_inputs, respond

MLP = {"0.weight": (5, 3), "0.bias": (5,), "2.weight": (4, 5), "2.bias": (4,),
       "4.weight": (2, 4), "4.bias": (2,)}  # fmt: skip
CNN = {"c.0.weight": (6, 1, 3, 3), "c.0.bias": (6,), "c.2.weight": (7, 6, 3, 3), "c.2.bias": (7,),
       "head.weight": (10, 7), "head.bias": (10,)}  # fmt: skip


def test_mlp_is_recognised():
    space = recognition.infer(MLP, {"activation": "ReLU"})
    assert (space.family, space.widths, space.activation) == ("mlp", (3, 5, 4, 2), "relu")
    assert space.names == tuple(MLP)
    assert str(space["2.weight"]) == "h2 h1*"
    assert space.shapes == MLP


def test_cnn_with_global_pooling_and_with_flatten_are_recognised():
    pooled = recognition.infer(CNN)
    assert (pooled.family, pooled.widths, pooled.forward.junction) == ("cnn", (1, 6, 7, 10), "pool")
    assert pooled.activation is None
    assert not pooled.forward.known
    flat = recognition.infer({**CNN, "head.weight": (10, 7 * 9)})
    assert (flat.layers[-1].taps, flat.forward.junction) == (9, "flatten")
    assert str(flat["head.weight"]) == "y (h2 s)*"
    x = probe_inputs(flat, 2, torch.Generator().manual_seed(0))
    w = {name: torch.randn(1, *shape) for name, shape in flat.shapes.items()}
    assert respond(flat.running("relu"), w, x).shape == (1, 2, 10)


def test_flatten_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match=r"head.weight.*does not read"):
        recognition.infer({**CNN, "head.weight": (10, 7 * 9 + 1)})


def test_siren_is_recognised_by_what_is_said():
    said = recognition.infer(MLP, {"w0": "25", "offset": "0.5"})
    assert (said.family, said.activation) == ("siren", "sin")
    assert (said.forward.w0, said.forward.offset, said.forward.known) == (25.0, 0.5, True)
    stated = recognition.infer(MLP, activation="sine")
    assert (stated.family, stated.forward.w0, stated.forward.known) == ("siren", 30.0, False)
    assert recognition.infer(MLP).family == "mlp"  # the control: nothing was said


NAMES = [
    ["0.weight", "0.bias", "2.weight", "2.bias", "10.weight", "10.bias"],
    ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "fc3.weight", "fc3.bias"],
    ["net.w1", "net.b1", "net.w2", "net.b2", "net.w3", "net.b3"],
    ["W_0", "b_0", "W_1", "b_1", "W_2", "b_2"],
    ["weights.0", "biases.0", "weights.1", "biases.1", "weights.2", "biases.2"],
    ["enc.weight", "enc.bias", "mid.weight", "mid.bias", "dec.weight", "dec.bias"],
    ["a", "b", "c", "d", "e", "f"],
    ["layers/0/w", "layers/0/b", "layers/1/w", "layers/1/b", "layers/2/w", "layers/2/b"],
]


@pytest.mark.parametrize("names", NAMES, ids=lambda n: n[0])
@pytest.mark.parametrize("seed", range(4))
def test_any_names_in_any_order_give_the_same_chain(names, seed):
    listed = list(zip(names, MLP.values(), strict=True))
    random.Random(seed).shuffle(listed)
    space = recognition.infer(dict(listed))
    assert space.widths == (3, 5, 4, 2)
    assert space.names == tuple(names)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.booleans(), st.randoms())
@settings(max_examples=60, deadline=None)
def test_numbered_layers_are_always_found(widths, bias, rng):
    space = spaces.mlp(widths, None, bias)
    listed = list(space.shapes.items())
    rng.shuffle(listed)
    found = recognition.infer(dict(listed))
    assert found.layers == space.layers


def test_layer10_comes_after_layer9():
    space = spaces.mlp([4] * 13, None)
    listed = dict(sorted(space.shapes.items()))  # as safetensors stores them
    assert recognition.infer(listed, ordered=False).layers == space.layers


def test_order_of_square_layers_without_numbers_is_the_given_one_or_ambiguous():
    square = {"up.weight": (4, 4), "across.weight": (4, 4), "out.weight": (2, 4)}
    given = [la.weight for la in recognition.infer(square).layers]
    assert given == list(square)
    with pytest.raises(InputError, match="ambiguous"):
        recognition.infer(square, ordered=False)


def test_bias_that_belongs_to_two_layers_is_ambiguous():
    shapes = {"p": (4, 3), "q": (4, 4), "r": (2, 4), "s": (4,)}
    with pytest.raises(InputError, match="of which layer"):
        recognition.infer(shapes)
    assert [la.bias for la in recognition.infer({**shapes, "t": (4,)}).layers] == ["s", "t", None]


FOREIGN = {
    "batch normalisation": {"1.running_mean": (5,), "1.running_var": (5,)},
    "normalisation": {"norm1.weight": (5,), "norm1.bias": (5,)},
    "of one dimension": {"1.weight": (5,), "1.bias": (5,)},
    "residual": {"layer1.0.downsample.0.weight": (5, 5)},
    "residual connections": {"shortcut.weight": (5, 5)},
    "attention": {"attn.q_proj.weight": (5, 5)},
    "recurrent": {"rnn.weight_ih_l0": (5, 5)},
    "embedding": {"embedding.weight": (100, 5)},
    "LoRA": {"0.lora_A.weight": (2, 5)},
    "quantised": {"0.qweight": (2, 5)},
    "reparametrised": {"0.weight_g": (5, 1)},
    "1-d convolution": {"conv.weight": (5, 5, 3)},
    "3-d convolution": {"conv.weight": (5, 5, 3, 3, 3)},
}


@pytest.mark.parametrize("reason", FOREIGN)
def test_foreign_layer_is_refused_by_the_name_of_its_tensor(reason):
    extra = FOREIGN[reason]
    with pytest.raises(UnsupportedError, match=reason) as caught:
        recognition.infer({**MLP, **extra})
    assert next(iter(extra)) in caught.value.message


@pytest.mark.parametrize(("cols", "word"), [(1, "depthwise"), (3, "grouped")])
def test_grouped_convolution_is_refused(cols, word):
    with pytest.raises(UnsupportedError, match=word):
        recognition.infer({**CNN, "c.2.weight": (7, cols, 3, 3)})


@pytest.mark.parametrize("name", ["resnet18", "mobilenet"])
def test_real_architectures_are_refused(name):
    block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    if name == "mobilenet":
        block = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
    with pytest.raises(UnsupportedError):
        recognition.infer({n: tuple(t.shape) for n, t in block.state_dict().items()})


def test_layers_that_need_an_addition_are_no_chain():
    with pytest.raises(InputError, match="no chain"):
        recognition.infer({"a.weight": (5, 3), "b.weight": (5, 3), "c.weight": (2, 5)})


def test_state_of_the_run_and_scalars_are_skipped_by_name():
    shapes = {**MLP, "optimizer.state.0.exp_avg": (5, 3), "temperature": (), "hole": (0, 3)}
    space = recognition.infer(shapes)
    assert space.size == sum(torch.Size(s).numel() for s in MLP.values())
    assert dict(space.skipped) == {
        "optimizer.state.0.exp_avg": recognition.OPTIMISER,
        "temperature": recognition.SCALAR,
        "hole": "an empty tensor",
    }


def test_stated_space_is_taken_and_checked():
    space = spaces.cnn([1, 3, 4], 5)
    said = {"qem.space": space.to_json()}
    assert recognition.infer(space.shapes, said) == space
    with pytest.raises(InputError, match=r"conv1\.weight"):
        recognition.infer({**space.shapes, "conv1.weight": (3, 1, 5, 5)}, said)
    with pytest.raises(InputError, match="not a weight space"):
        recognition.infer(space.shapes, {"qem.space": "{}"})


def test_activation_is_what_is_stated_then_what_the_file_says_then_unknown():
    assert recognition.infer(MLP, {"activation": "tanh"}, "gelu").activation == "gelu"
    assert recognition.infer(MLP, {"config.activation": "nn.Tanh"}).activation == "tanh"
    assert recognition.infer(MLP, {"activation": "mystery"}).activation is None
    with pytest.raises(UsageError, match="no activation is called 'rleu'") as caught:
        recognition.infer(MLP, activation="rleu")
    assert caught.value.hint == "Did you mean 'relu'?"


def keras(shapes):
    """The shapes as Keras stores and names them."""
    turn = {4: lambda s: (s[2], s[3], s[1], s[0]), 2: lambda s: (s[1], s[0]), 1: lambda s: s}
    names = {n: n.replace(".weight", "/kernel:0").replace(".bias", "/bias:0") for n in shapes}
    return {names[n]: turn[len(s)](s) for n, s in shapes.items()}


def test_keras_layout_is_turned():
    stored = keras(CNN)
    assert stored["c.2/kernel:0"] == (3, 3, 6, 7)
    turned = recognition.turned(stored)
    assert list(turned.values()) == list(CNN.values())
    assert recognition.infer(turned).widths == (1, 6, 7, 10)
    with pytest.raises(UnsupportedError, match="channels-last"):
        recognition.infer(recognition.turned(keras({**CNN, "head.weight": (10, 63)})))


def test_search_ends_on_a_hundred_equal_layers():
    letters = itertools.product("abcdefghij", repeat=2)
    shapes = {f"{x}{y}.weight": (4, 4) for x, y in letters}
    shapes["zz.weight"] = (3, 9)
    with pytest.raises(InputError, match="no chain"):
        recognition.infer(shapes)


@pytest.mark.parametrize("named", ["layer{}.weight", "block{}q.weight"])
def test_a_thousand_equal_layers_are_put_in_order_at_once(named):
    shapes = {named.format(i): (8, 8) for i in reversed(range(600))}
    shapes |= {named.format(i).replace("weight", "bias"): (8,) for i in range(600)}
    started = time.process_time()
    found = recognition.infer(shapes)
    assert [layer.weight for layer in found.layers] == [named.format(i) for i in range(600)]
    assert time.process_time() - started < 5  # seconds: it was once quadratic


def test_a_thousand_equal_layers_without_numbers_are_ambiguous_at_once():
    shapes = {f"{'ab'[i % 2] * (i + 1)}.weight": (8, 8) for i in range(1000)}
    started = time.process_time()
    with pytest.raises(InputError, match="ambiguous"):
        recognition.infer(shapes, ordered=False)
    assert time.process_time() - started < 10
