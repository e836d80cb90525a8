"""ONNX models: initialisers in torch's layout, whatever reads them and however they are stored."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qemcli.checkpoints import open_checkpoint
from qemcli.errors import EnvironmentFailure, InputError, UnsupportedError
from qemcli.functions import respond
from qemcli.zoos.indexing import index

RNG = np.random.default_rng(0)
W1, B1 = RNG.normal(size=(5, 3)).astype("f4"), RNG.normal(size=5).astype("f4")
W2, B2 = RNG.normal(size=(2, 5)).astype("f4"), RNG.normal(size=2).astype("f4")


def model(nodes, weights, path, inner=()):
    """A model with these nodes and initialisers, x -> y."""
    protos = [
        value if isinstance(value, TensorProto) else numpy_helper.from_array(value, name)
        for name, value in weights.items()
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 2])
    graph = helper.make_graph([*nodes, *inner], "g", [x], [y], protos)
    made = helper.make_model(graph, producer_name="test", producer_version="1")
    made.metadata_props.add(key="test_accuracy", value="0.75")
    onnx.save(made, path)
    return path


def gemm(path, activation="Relu", transposed=True, **change):
    """x -> Gemm -> activation -> Gemm, weights stored output first or input first."""
    turn = (lambda w: w) if transposed else (lambda w: np.ascontiguousarray(w.T))
    weights = {"0.weight": turn(W1), "0.bias": B1, "2.weight": turn(W2), "2.bias": B2, **change}
    nodes = [
        helper.make_node("Gemm", ["x", "0.weight", "0.bias"], ["a"], transB=int(transposed)),
        helper.make_node(activation, ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "2.weight", "2.bias"], ["y"], transB=int(transposed)),
    ]
    return model(nodes, weights, path)


def assert_holds(found):
    space = found.space()
    assert space.widths == (3, 5, 2)
    flat = torch.from_numpy(found.row(space))[None]
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    hidden = torch.relu(x @ torch.from_numpy(W1).T + torch.from_numpy(B1))
    expected = hidden @ torch.from_numpy(W2).T + torch.from_numpy(B2)
    torch.testing.assert_close(respond(space, space.unflatten(flat), x)[0], expected)


@pytest.mark.parametrize("transposed", [True, False])
def test_gemm_is_read_either_way(tmp_path, transposed):
    found = open_checkpoint(gemm(tmp_path / "a.onnx", transposed=transposed))
    assert (found.format, found.metadata["activation"]) == ("onnx_file", "relu")
    assert (found.metadata["producer"], found.metadata["test_accuracy"]) == ("test 1", "0.75")
    assert_holds(found)


def test_matmul_and_add_is_read_in_the_order_of_the_graph(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_9"], ["a"]),
        helper.make_node("Add", ["0.bias", "a"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "onnx::MatMul_12"], ["d"]),
        helper.make_node("Add", ["d", "2.bias"], ["y"]),
    ]
    weights = {
        "2.bias": B2, "onnx::MatMul_12": np.ascontiguousarray(W2.T), "0.bias": B1,
        "onnx::MatMul_9": np.ascontiguousarray(W1.T),
    }  # fmt: skip
    found = open_checkpoint(model(nodes, weights, tmp_path / "a.onnx"))
    assert next(iter(found.shapes)) == "onnx::MatMul_9"
    assert_holds(found)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64", "typed"])
def test_precisions_are_read(tmp_path, kind):
    if kind == "typed":  # numbers in the float field rather than raw bytes
        change = {"0.bias": helper.make_tensor("0.bias", TensorProto.FLOAT, [5], B1.tolist())}
    else:
        number = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16,
                  "float64": TensorProto.DOUBLE}[kind]  # fmt: skip
        change = {"0.bias": helper.make_tensor("0.bias", number, [5], B1.astype("f8").tolist())}
    found = open_checkpoint(gemm(tmp_path / "a.onnx", **change))
    array = found.tensors()["0.bias"]
    torch_kind = {"typed": torch.float32}.get(kind) or getattr(torch, kind)
    expected = torch.from_numpy(B1).to(torch_kind).to(torch.float64).numpy()
    np.testing.assert_array_equal(array, expected)


def test_data_beside_is_read_in_the_folder_only(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    path = gemm(folder / "a.onnx")
    whole = onnx.load(path)
    onnx.save(whole, path, save_as_external_data=True, location="a.data", size_threshold=0)
    assert_holds(open_checkpoint(path))
    (folder / "a.data").write_bytes((folder / "a.data").read_bytes()[:-4])
    with pytest.raises(InputError, match="cut short"):
        open_checkpoint(path)
    (tmp_path / "secret").write_bytes(bytes(1000))
    (folder / "link").symlink_to(tmp_path / "secret")
    for location in ("../secret", "/etc/passwd", "link", "none", ""):
        hostile = onnx.load(path, load_external_data=False)
        for tensor in hostile.graph.initializer:
            for entry in tensor.external_data:
                entry.value = location if entry.key == "location" else entry.value
        path.write_bytes(hostile.SerializeToString())
        with pytest.raises(InputError, match=r"outside the model's folder|is missing"):
            open_checkpoint(path)


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (helper.make_node("Add", ["a", "b"], ["s"]), "two computed values meet in Add 's'"),
        (helper.make_node("BatchNormalization", ["a", "0.bias"], ["s"]), "normalisation"),
        (helper.make_node("LSTM", ["a", "0.bias"], ["s"]), "recurrent"),
    ],
)
def test_graph_that_is_no_chain_says_so_and_is_listed(tmp_path, node, reason):
    path = gemm(tmp_path / "a.onnx")
    made = onnx.load(path)
    made.graph.node.append(node)
    onnx.save(made, path)
    with pytest.raises(UnsupportedError, match=reason):
        open_checkpoint(path).space()
    assert reason in next(iter(index(tmp_path, out=tmp_path / "o")["only_listed"]))


def test_tensors_of_branches_are_listed_under_their_node(tmp_path):
    inner = helper.make_graph(
        [], "inner", [], [], [numpy_helper.from_array(np.ones(2, "f4"), "hid")]
    )
    node = helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=inner)
    path = gemm(tmp_path / "a.onnx")
    made = onnx.load(path)
    made.graph.node.append(node)
    onnx.save(made, path)
    found = open_checkpoint(path)
    assert {n: s for n, s in found.shapes.items() if n.endswith("hid")} == {
        "z.then_branch.hid": (2,), "z.else_branch.hid": (2,)
    }  # fmt: skip
    with pytest.raises(UnsupportedError, match="branches or loops"):
        found.space()


def test_constants_are_tensors_too(tmp_path):
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(W1, "any")),
        helper.make_node("Constant", [], ["one"], value=helper.make_tensor("o", 1, [], [1.0])),
        helper.make_node("Gemm", ["x", "w", "0.bias"], ["a"], transB=1),
        helper.make_node("Mul", ["a", "one"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Gemm", ["c", "2.weight", "2.bias"], ["y"], transB=1),
    ]
    weights = {"0.bias": B1, "2.weight": W2, "2.bias": B2}
    found = open_checkpoint(model(nodes, weights, tmp_path / "a.onnx"))
    assert list(found.shapes) == ["w", "0.bias", "2.weight", "2.bias"]
    assert_holds(found)


def test_cut_model_is_one_clear_error(tmp_path):
    whole = gemm(tmp_path / "a.onnx").read_bytes()
    file = tmp_path / "cut.onnx"
    end = whole.index(b"test_accuracy") - 4  # the last field: what comes before it is needed
    for count in [*range(0, end, 5), end - 1]:
        file.write_bytes(whole[:count])
        with pytest.raises(InputError) as caught:
            open_checkpoint(file).tensors()
        assert "\n" not in caught.value.message


def test_pooled_tanh_claims_no_sign(tmp_path):
    path = gemm(tmp_path / "a.onnx", "Tanh")
    assert open_checkpoint(path).space().activation == "tanh"
    made = onnx.load(path)
    made.graph.node.append(helper.make_node("MaxPool", ["b"], ["p"], kernel_shape=[2, 2]))
    onnx.save(made, path)
    assert open_checkpoint(path).space().activation is None


def test_without_onnx_the_extra_is_named(tmp_path, monkeypatch):
    path = gemm(tmp_path / "a.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(EnvironmentFailure) as caught:
        open_checkpoint(path)
    assert caught.value.hint == 'pip install "qemcli[onnx]"'
