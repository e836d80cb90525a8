"""ONNX: the initialisers and constants of a graph, by onnx (the extra `qemcli[onnx]`); nothing is
run.

A matrix that a MatMul, or a Gemm without transB, reads is stored input first and is turned to
torch's order. Tensors in files beside are read where they lie inside the model's own folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qemcli.checkpoints import FLOATS, Checkpoint, peek
from qemcli.errors import EnvironmentFailure, InputError
from qemcli.formats.safetensors import decode

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

# TensorProto.DataType: its number -> (torch's name, bits of one number)
DTYPES = {
    1: ("float32", 32), 2: ("uint8", 8), 3: ("int8", 8), 4: ("uint16", 16), 5: ("int16", 16),
    6: ("int32", 32), 7: ("int64", 64), 9: ("bool", 8), 10: ("float16", 16), 11: ("float64", 64),
    12: ("uint32", 32), 13: ("uint64", 64), 14: ("complex64", 64), 15: ("complex128", 128),
    16: ("bfloat16", 16), 17: ("float8_e4m3fn", 8), 18: ("float8_e4m3fnuz", 8),
    19: ("float8_e5m2", 8), 20: ("float8_e5m2fnuz", 8), 21: ("uint4", 4), 22: ("int4", 4),
    23: ("float4_e2m1", 4),
}  # fmt: skip
FIELDS = b"\x12\x1a\x22\x28\x32\x3a\x42\x72"  # what may follow the version in a ModelProto
ACTS = {
    "Relu": "relu", "Tanh": "tanh", "Sigmoid": "sigmoid", "Gelu": "gelu", "LeakyRelu": "leaky_relu",
    "Sin": "sin", "Softplus": "softplus", "Elu": "elu", "Erf": "gelu",
}  # fmt: skip
JOINS = frozenset({"Add", "Sub", "Mul", "Div", "Concat", "Sum", "Max", "Min", "MatMul", "Gemm"})
NORMS = frozenset({"BatchNormalization", "InstanceNormalization", "LayerNormalization"})


@dataclass(frozen=True)
class _Tensor:
    """One initialiser: its shape as stored, whether it is turned, where its numbers are."""

    name: str
    proto: TensorProto
    shape: tuple[int, ...]
    dtype: str
    turn: bool

    @property
    def turned(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.turn else self.shape


def sniff(path: Path) -> bool:
    """A protobuf that begins with a small version number, as every ONNX model does."""
    head = peek(path, 3)
    return len(head) == 3 and head[0] == 8 and 0 < head[1] < 32 and head[2] in FIELDS


def open(path: Path) -> Checkpoint:
    """The checkpoint of the graph's tensors, in the order in which its nodes read them.

    Raises EnvironmentFailure without onnx, InputError for a damaged file or one whose tensors lie
    outside its folder.
    """
    model = _load(path)
    graph = model.graph
    first = _input_first(graph)
    found = {name: _tensor(path, name, t, name in first) for name, t in _tensors(graph)}
    reads = [name for node in graph.node for name in node.input if name in found]
    order = list(dict.fromkeys([*reads, *found]))
    if not order or not model.opset_import:
        what = "without initialisers" if model.opset_import else "that is cut short"
        raise InputError(f"{path}: an ONNX graph {what}", "export it again, with its weights")
    return Checkpoint(
        path,
        "onnx_file",
        {n: found[n].turned for n in order},
        {n: found[n].dtype for n in order},
        _said(model),
        lambda names: {n: _read(path, found[n]) for n in names},
        refusal=_refusal(graph, set(found)),
    )


def _load(path: Path) -> ModelProto:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise EnvironmentFailure(
            f"{path}: an ONNX model, which needs onnx", 'pip install "qemcli[onnx]"'
        ) from None
    try:
        return onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError, OSError, RecursionError) as error:
        said = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: an ONNX model that is cut short or damaged ({said})",
            "download or write it again",
        ) from None


def _tensors(graph: Any, below: str = "") -> Iterator[tuple[str, TensorProto]]:
    """(name, tensor) of the initialisers, of constants that are no single numbers, and of those
    inside branches and loops, under the name of their node."""
    for proto in graph.initializer:
        yield below + proto.name, proto
    for node in graph.node:
        name = below + (node.name or (node.output[0] if node.output else node.op_type))
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value" and attribute.t.dims:
                yield below + node.output[0], attribute.t
            for inside in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _tensors(inside, f"{name}.{attribute.name}.")


def _tensor(path: Path, name: str, proto: TensorProto, input_first: bool) -> _Tensor:
    dtype, bits = DTYPES.get(proto.data_type, (f"ONNX type {proto.data_type}", 0))
    shape = tuple(proto.dims)
    if any(n < 0 for n in shape):
        raise InputError(f"{path}: tensor '{name}' has the shape {shape}")
    made = _Tensor(name, proto, shape, dtype, input_first and len(shape) == 2)
    if dtype in FLOATS and 8 * _stored(path, proto) != bits * math.prod(shape):
        raise InputError(
            f"{path}: tensor '{name}' {shape} does not hold as many numbers",
            "download or write it again",
        )
    return made


def _input_first(graph: Any) -> set[str]:
    """The second matrices of x W."""
    return {
        node.input[1]
        for node in graph.node
        if node.op_type in ("MatMul", "Gemm")
        and len(node.input) > 1
        and not any(a.name == "transB" and a.i for a in node.attribute)
    }


def _external(path: Path, proto: TensorProto) -> tuple[Path, int, int]:
    """(file, offset, bytes) of a tensor that lies beside the model; never outside its folder."""
    said = {entry.key: entry.value for entry in proto.external_data}
    name = said.get("location", "")
    root = path.resolve().parent
    file = (root / name).resolve()
    if not name or root not in file.parents:
        raise InputError(f"{path}: tensor '{proto.name}' lies outside the model's folder ({name})")
    try:
        size = file.stat().st_size
        offset = int(said.get("offset", 0))
        length = int(said.get("length", size - offset))
    except (OSError, ValueError):
        raise InputError(
            f"{path}: the file '{name}' of tensor '{proto.name}' is missing", "fetch it as well"
        ) from None
    if offset < 0 or length < 0 or offset + length > size:
        raise InputError(f"{file}: cut short: needs {offset + length} bytes, has {size}")
    return file, offset, length


def _stored(path: Path, proto: TensorProto) -> int:
    """The bytes that a tensor of floats has in the file, or would have as raw bytes."""
    if proto.data_location == 1:
        return _external(path, proto)[2]
    if proto.raw_data:
        return len(proto.raw_data)
    width = {1: 4, 10: 2, 11: 8, 16: 2, 17: 1, 19: 1}[proto.data_type]
    return width * sum(map(len, (proto.float_data, proto.double_data, proto.int32_data)))


def _read(path: Path, tensor: _Tensor) -> np.ndarray:
    proto = tensor.proto
    if tensor.dtype not in FLOATS:
        raise InputError(f"{path}: tensor '{tensor.name}': unsupported dtype {tensor.dtype}")
    if proto.data_location == 1:
        file, offset, length = _external(path, proto)
        with file.open("rb") as opened:
            opened.seek(offset)
            raw = opened.read(length)
    else:
        raw = proto.raw_data or _typed(proto, tensor.dtype)
    array = decode(raw, tensor.dtype).reshape(tensor.shape)
    return array.T if tensor.turn else array


def _typed(proto: TensorProto, dtype: str) -> bytes:
    """Numbers in the typed fields as the bytes they would be; halves are kept as integers."""
    if dtype == "float32":
        return np.array(proto.float_data, "<f4").tobytes()
    if dtype == "float64":
        return np.array(proto.double_data, "<f8").tobytes()
    kind = "<u2" if dtype in ("float16", "bfloat16") else "u1"
    return np.array(proto.int32_data, "<i4").astype(kind).tobytes()


def _refusal(graph: Any, weights: set[str]) -> str | None:
    """Why the graph is no chain of layers; None where nothing in it says so."""
    if any(a.HasField("g") or a.graphs for node in graph.node for a in node.attribute):
        return "a graph with branches or loops inside"
    given = weights | {out for n in graph.node if n.op_type == "Constant" for out in n.output}
    for node in graph.node:
        if node.op_type in NORMS:
            return f"normalisation ({node.op_type})"
        if node.op_type in ("LSTM", "GRU", "RNN"):
            return f"a recurrent layer ({node.op_type})"
        if node.op_type in JOINS and len({n for n in node.input if n} - given) > 1:
            return f"two computed values meet in {node.op_type} '{node.name or node.output[0]}'"
    return None


def _said(model: ModelProto) -> dict[str, Any]:
    """The file's own metadata, its producer, and the activation where there is one and only one."""
    said: dict[str, Any] = {p.key: p.value for p in model.metadata_props}
    if model.producer_name:
        said["producer"] = f"{model.producer_name} {model.producer_version}".strip()
    kinds = {node.op_type for node in model.graph.node}
    found = {ACTS[kind] for kind in kinds if kind in ACTS}
    pooled = "MaxPool" in kinds and found & {"tanh", "sin"}  # max(-x) is not -max(x)
    if len(found) == 1 and not pooled:
        said.setdefault("activation", found.pop())
    return said
