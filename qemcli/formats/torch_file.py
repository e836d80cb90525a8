"""torch.save files (.pt, .pth, .bin, .ckpt, or no suffix), with weights_only=True and never
otherwise.

A state dict stands at the top or under one of WRAPPERS; what stands beside it becomes metadata.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from struct import error as struct_error
from typing import Any, NoReturn

import numpy as np

from qemcli.checkpoints import Checkpoint, peek
from qemcli.errors import InputError

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights", "params")
PREFIXES = ("module.", "_orig_mod.")  # DataParallel and torch.compile put them before every name
SETTINGS = ("config", "hyper_parameters", "hparams", "args")
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
    """The checkpoint; raises InputError for what weights_only=True does not load."""
    tree = _load(path, _is_zip(path))
    state, metadata, skipped = _unwrap(path, tree)
    return Checkpoint(
        path,
        "torch_file",
        {n: tuple(t.shape) for n, t in state.items()},
        {n: str(t.dtype).removeprefix("torch.") for n, t in state.items()},
        metadata,
        lambda names: _arrays(path, state, names),
        skipped=skipped,
    )


def _is_zip(path: Path) -> bool:
    """True for the zip format; raises InputError where the zip is damaged or compressed."""
    if not peek(path).startswith(b"PK"):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, struct_error, NotImplementedError):
        size = path.stat().st_size
        raise InputError(
            f"{path}: a torch file that is cut short or damaged (has {size} bytes)",
            "download or write it again",
        ) from None
    if any(m.compress_type != zipfile.ZIP_STORED for m in members):
        raise InputError(
            f"{path}: a zip with compressed members, which torch.save does not write",
            "load and save it again with torch.save",
        )
    return True


def _load(path: Path, mapped: bool) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except _ERRORS as error:
        _explain(path, mapped, error)


def _explain(path: Path, zipped: bool, error: BaseException) -> NoReturn:
    """Say which foreign names the file wants to import, or that it is damaged."""
    names = _foreign(path) if zipped else []
    if names or "Weights only load failed" in str(error):
        wants = f" (it wants {', '.join(names[:3])})" if names else ""
        raise InputError(
            f"{path}: it holds Python objects besides tensors{wants} and is not opened",
            "save model.state_dict() alone, where the file comes from",
        ) from None
    first = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
    raise InputError(
        f"{path}: a torch file that is cut short or damaged ({first})", "download or write it again"
    ) from None


def _foreign(path: Path) -> list[str]:
    import torch

    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except _ERRORS:
        return []


def _unwrap(path: Path, tree: Any) -> tuple[dict[str, Any], dict[str, Any], tuple]:
    """(state dict, metadata, skipped) of what torch.load returned."""
    import torch

    if isinstance(tree, torch.Tensor):
        tree = {"tensor": tree}
    if not isinstance(tree, Mapping):
        raise InputError(f"{path}: holds a {type(tree).__name__}, not a dict of tensors")
    metadata: dict[str, Any] = {}
    skipped: list[tuple[str, str]] = []
    while True:
        metadata.update(_scalars(tree))
        key = next((k for k in WRAPPERS if _holds_tensors(tree.get(k))), None)
        if key is None or any(isinstance(v, torch.Tensor) for v in tree.values()):
            break
        outside = [n for k, v in tree.items() if k != key for n, _ in _walk(v, str(k))]
        skipped += [(n, f"outside '{key}'") for n in outside]
        tree = tree[key]
    state = dict(_walk(tree, ""))
    if not state:
        raise InputError(f"{path}: holds no tensor", "give a state_dict")
    size = path.stat().st_size
    vast = next((n for n, t in state.items() if t.numel() * t.element_size() > size), None)
    if vast:
        raise InputError(f"{path}: tensor '{vast}' claims more numbers than the file holds")
    bad = next((n for n, t in state.items() if t.layout != torch.strided), None)
    if bad:
        raise InputError(f"{path}: tensor '{bad}' is {state[bad].layout}, not dense")
    return _stripped(state), metadata, tuple(skipped)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and next(_walk(value, ""), None) is not None


def _walk(value: Any, name: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(dotted name, tensor) of every tensor below `value`."""
    import torch

    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping) and depth < 8:
        for key, item in value.items():
            yield from _walk(item, f"{name}.{key}" if name else str(key), depth + 1)


def _scalars(tree: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The numbers and strings of a dict; settings under `config.`."""
    for key, value in tree.items():
        if isinstance(value, bool | int | float | str):
            yield str(key), value
        elif key in SETTINGS and isinstance(value, Mapping):
            for name, item in value.items():
                if isinstance(item, bool | int | float | str):
                    yield f"config.{name}", item


def _stripped(state: dict[str, Any]) -> dict[str, Any]:
    """Without the prefixes that wrappers of a module put before every name."""
    for prefix in PREFIXES * 2:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): t for name, t in state.items()}
    return state


def _arrays(path: Path, state: Mapping[str, Any], names: Iterable[str]) -> dict[str, np.ndarray]:
    import torch

    found = {}
    for name in names:
        tensor = state[name]
        if not tensor.is_floating_point():
            raise InputError(f"{path}: tensor '{name}': unsupported dtype {tensor.dtype}")
        wide = tensor.dtype if tensor.dtype == torch.float64 else torch.float32
        found[name] = tensor.detach().to(wide).contiguous().numpy()
    return found
