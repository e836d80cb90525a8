"""torch.save files (.pt, .pth, .bin, .ckpt, or no suffix), read as data: see _torch_pickles.py.
What that does not know goes to torch.load with weights_only=True, and to nothing else.

A state dict stands at the top or under one of WRAPPERS; what stands beside it becomes metadata.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from struct import error as struct_error
from typing import Any, NoReturn

import numpy as np

from qemcli.checkpoints import TRUST, Checkpoint, RunsCode, peek
from qemcli.errors import InputError
from qemcli.formats._pickle_machine import Foreign
from qemcli.formats._torch_pickles import arrays, located
from qemcli.formats._torch_tensors import Beyond, Stored

WRAPPERS = (
    "state_dict", "model_state_dict", "model", "net", "weights", "params", "module", "model_state",
)  # fmt: skip
PREFIXES = ("module.",)  # DataParallel puts it before every name
INNER = re.compile(
    r"(?<![^.])(_orig_mod|_forward_module)\."
)  # torch.compile and Lightning: anywhere
SETTINGS = ("config", "hyper_parameters", "hparams", "args")
MAX_DEPTH = 12  # of dicts in dicts
MAX_TENSORS = 500_000
MAX_SETTINGS = 20_000  # values: one list may stand in many places
MAX_SHARED = 16  # times the bytes of a file that its tensors may claim: tied weights are shared
_LEGACY = b"\xfc\x9cF\xf9 j\xa8P\x19"  # torch's magic number, as the first pickle holds it
# What torch.load raises on a file that was damaged on purpose is anything but documented.
_ERRORS = (
    pickle.UnpicklingError, RuntimeError, ValueError, LookupError, EOFError, TypeError,
    AttributeError, AssertionError, ArithmeticError, ImportError, OSError, MemoryError,
    zipfile.BadZipFile, struct_error, Warning,
)  # fmt: skip


def sniff(path: Path) -> bool:
    """A zip that holds */data.pkl, or a pickle that begins with torch's magic number."""
    head = peek(path)
    if head.startswith(b"PK\x03\x04"):
        # torch writes data.pkl first; a zip that was cut short has no directory to look into.
        return re.match(rb".{26}(?s:.{4})[^/]{1,200}/data\.pkl", head, re.DOTALL) is not None
    return head[:1] == b"\x80" and _LEGACY in head[:40]


def open(path: Path) -> Checkpoint:
    """The checkpoint; raises InputError for a file that holds none, or would run code if loaded."""
    try:
        found = located(path)
        if found.calls:
            _refuse_calls(path, found.calls)
        tree = found.tree
    except Beyond as why:
        tree = _load(path, str(why))
    state, metadata, skipped = _unwrap(path, tree)
    return Checkpoint(
        path,
        "torch_file",
        {n: t.shape for n, t in state.items()},
        {n: t.dtype for n, t in state.items()},
        metadata,
        lambda names: _read(path, {n: state[n] for n in names}),
        skipped=skipped,
    )


def plain(value: Any, depth: int = 0, left: Iterator[int] | None = None) -> Any:
    """Settings as dicts, lists and scalars: an object of another class is what it holds
    (OmegaConf's nodes, a Namespace, a dataclass), None where it holds nothing that is known, and
    for what comes after MAX_SETTINGS values."""
    left = iter(range(MAX_SETTINGS)) if left is None else left
    if next(left, None) is None:
        return None
    if isinstance(value, Foreign) and depth < MAX_DEPTH:
        held = value.state if isinstance(value.state, Mapping) else value.items
        inner = next((held[k] for k in ("_content", "_val") if k in held), held)
        return plain(inner, depth + 1, left) if inner else None
    if isinstance(value, Mapping) and depth < MAX_DEPTH:
        return {k: plain(v, depth + 1, left) for k, v in value.items()}
    if isinstance(value, list | tuple) and depth < MAX_DEPTH:
        return [plain(v, depth + 1, left) for v in value]
    return value if isinstance(value, bool | int | float | str) else None


def _refuse_calls(path: Path, calls: tuple[str, ...]) -> NoReturn:
    wanted = ", ".join(name[:80] for name in calls[:3])
    raise RunsCode(
        f"{path}: it holds Python objects besides tensors, would call {wanted}, and is not opened",
        f"save model.state_dict() alone, where the file comes from; {TRUST}",
    )


@dataclass(eq=False)
class _Loaded:
    """A tensor that torch.load made."""

    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def size(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


def _load(path: Path, why: str) -> Any:
    """By torch itself, weights_only; `why` says what of it we do not read."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except _ERRORS as error:
        first = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        kind = RunsCode if isinstance(error, pickle.UnpicklingError) else InputError
        raise kind(
            f"{path}: a torch file that holds more than dense tensors ({why}; {first})",
            "save model.state_dict() alone, where the file comes from",
        ) from None
    return _leaves(path, tree)


def _leaves(path: Path, value: Any, known: dict[int, Any] | None = None, depth: int = 0) -> Any:
    """The value with its tensors as ours; what stands in it twice is looked at once."""
    import torch

    known = {} if known is None else known
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_quantized:
            kind = "quantised" if value.is_quantized else value.layout
            raise InputError(f"{path}: a tensor in it is {kind}, not dense")
        known[id(value)] = _Loaded(value)
    elif isinstance(value, Mapping) and depth < MAX_DEPTH:
        made = known[id(value)] = {}
        made.update((k, _leaves(path, v, known, depth + 1)) for k, v in value.items())
    else:
        return value
    return known[id(value)]


def _unwrap(path: Path, tree: Any) -> tuple[dict[str, Any], dict[str, Any], tuple]:
    """(state dict, metadata, skipped) of what the file holds."""
    if isinstance(tree, Stored | _Loaded):
        tree = {"tensor": tree}
    found = _parts(tree)
    if found is None:
        kind = tree.name if isinstance(tree, Foreign) else type(tree).__name__
        raise InputError(f"{path}: holds a {kind}, not a dict of tensors")
    tree = found
    metadata: dict[str, Any] = {}
    skipped: list[tuple[str, str]] = []
    for _ in range(MAX_DEPTH):  # a dict may stand in itself
        metadata.update(_scalars(tree))
        key = next((k for k in WRAPPERS if _holds_tensors(tree.get(k))), None)
        if key is None or any(isinstance(v, Stored | _Loaded) for v in tree.values()):
            break
        skipped += _besides(tree, key)
        tree = _parts(tree[key]) or {}
    state = dict(_walk(tree, ""))
    if not state:
        raise InputError(f"{path}: holds no tensor", "give a state_dict")
    _plausible(path, state)
    return _stripped(state), metadata, (*skipped, *_objects(tree))


def _besides(tree: Mapping[Any, Any], key: str) -> Iterator[tuple[str, str]]:
    """(name, reason) of the tensors outside the state dict, and of the objects there."""
    outside = {k: v for k, v in tree.items() if k != key}
    for name, _ in _walk(outside, ""):
        yield name, f"outside '{key}'"
    yield from _objects({k: v for k, v in outside.items() if k not in SETTINGS})


def _objects(tree: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, Foreign) and _parts(value) is None:
            yield str(name), f"a Python object ({value.name[:80]}), which is never made"


def _plausible(path: Path, state: Mapping[str, Any]) -> None:
    size = path.stat().st_size
    vast = next((n for n, t in state.items() if t.size > size), None)
    if vast:
        raise InputError(f"{path}: tensor '{vast}' claims more numbers than the file holds")
    if sum(t.size for t in state.values()) > MAX_SHARED * size:
        raise InputError(f"{path}: its tensors claim more numbers than the file holds")


def _parts(value: Any) -> Mapping[Any, Any] | None:
    """What may hold tensors by name: a dict, or a module that was saved whole."""
    if isinstance(value, Mapping):
        return value
    state = value.state if isinstance(value, Foreign) else None
    if not isinstance(state, Mapping):
        return None
    if value.name.startswith("__torch__."):  # TorchScript
        return state
    held = [state.get(k) for k in ("_parameters", "_buffers", "_modules")]
    known = [h for h in held if isinstance(h, Mapping)]
    return {k: v for h in known for k, v in h.items()} if len(known) == 3 else None


def _holds_tensors(value: Any) -> bool:
    return _parts(value) is not None and next(_walk(value, ""), None) is not None


def _walk(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(dotted name, tensor) of every tensor below `value`; InputError where one dict stands in so
    many places that there is no end to it."""
    left = MAX_TENSORS
    waiting = [(value, name, 0)]
    while waiting:
        item, at, depth = waiting.pop()
        parts = _parts(item) if depth < MAX_DEPTH else None
        if isinstance(item, list | tuple) and depth < MAX_DEPTH:
            parts = dict(enumerate(item))
        if isinstance(item, Stored | _Loaded):
            yield at, item
        elif parts is not None:
            left -= len(parts)
            if left < 0:
                raise InputError(f"a torch file of more than {MAX_TENSORS} entries")
            listed = [(v, f"{at}.{k}" if at else str(k), depth + 1) for k, v in parts.items()]
            waiting += reversed(listed)


def _scalars(tree: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The numbers and strings of a dict; settings under `config.`."""
    for key, value in tree.items():
        if isinstance(value, bool | int | float | str):
            yield str(key), value
        elif key in SETTINGS and isinstance(settings := plain(value), Mapping):
            for name, item in settings.items():
                if isinstance(item, bool | int | float | str):
                    yield f"config.{name}", item


def _stripped(state: dict[str, Any]) -> dict[str, Any]:
    """Without the names that wrappers of a module put before or into its own."""
    bare = {INNER.sub("", name): t for name, t in state.items()}
    state = bare if len(bare) == len(state) else state
    for prefix in PREFIXES * 2:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): t for name, t in state.items()}
    return state


def _read(path: Path, state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors as arrays, in the order of `state`."""
    found = arrays(path, {n: t for n, t in state.items() if isinstance(t, Stored)})
    return {n: found[n] if n in found else _array(path, n, t.tensor) for n, t in state.items()}


def _array(path: Path, name: str, tensor: Any) -> np.ndarray:
    import torch

    if not tensor.is_floating_point():
        raise InputError(f"{path}: tensor '{name}': unsupported dtype {tensor.dtype}")
    wide = tensor.dtype if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to(wide).contiguous().numpy()
