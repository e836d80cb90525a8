"""Checkpoint directories as the transformers library writes them, moved along their orbit.

What is written has the source's files under the source's names: shards, config, tokenizer; tensors
in the dtype that they were stored in. Blocks are moved one at a time, in float64.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qemcli import __version__, groups
from qemcli.checkpoints import open_checkpoint
from qemcli.errors import UsageError
from qemcli.formats.directory import SHARDED, SINGLE, shards, sniff
from qemcli.spaces import Transformer, transformer_of
from qemcli.writing import beside

INDEX = ".index.json"
BESIDE = frozenset({".json", ".txt", ".model", ".md", ".jinja", ".tiktoken", ".vocab", ".bpe"})
NARROW = (0.67, 1.5)  # scales for 16 bits: condition 2.2, a digit and no more is lost


def is_directory(path: Path) -> bool:
    """True for a folder of the transformers library's: config.json and weights, whole or not."""
    return path.is_dir() and sniff(path)


@dataclass(frozen=True)
class Directory:
    """A checkpoint directory: the weight space, and which file holds which tensors."""

    path: Path
    space: Transformer
    files: Mapping[str, tuple[str, ...]]

    @classmethod
    def open(cls, path: Path, activation: str | None = None, heads: int | None = None) -> Directory:
        """Raises InputError or UnsupportedError where it holds no transformer that qem knows."""
        space = open_checkpoint(path).space(activation, heads)
        return cls(path, transformer_of(space, "a checkpoint directory"), _files(path))

    def read(self, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        """Tensors as they are stored; all that the files hold where no names are given."""
        found: dict[str, Tensor] = {}
        for file, held in self.files.items():
            wanted = held if names is None else [n for n in held if n in set(names)]
            found |= _read(self.path / file, wanted) if wanted else {}
        return found

    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of its weights."""
        return {
            x.dtype for part in groups.parts(self.space) for x in self.read(part.names).values()
        }

    def exact(self) -> dict[str, Tensor]:
        """Every tensor of the weight space as (1, *shape) float64."""
        return {n: x.double()[None] for n, x in self.read(self.space.names).items()}

    def scales(self) -> tuple[float, float]:
        """The range of scales that the stored dtype can carry."""
        wide = all(torch.finfo(dtype).bits > 16 for dtype in self.dtypes())
        return (0.1, 10.0) if wide else NARROW

    def write(self, g: groups.Element, out: Path, told: Mapping[str, Any]) -> None:
        """The directory moved by `g` (an element for one network) into `out`, a new folder."""
        groups.check(g, self.space, 1)
        moved: dict[str, Tensor] = {}
        for part in groups.parts(self.space):
            stored = {n: x[None] for n, x in self.read(part.names).items()}
            moved |= {n: x[0] for n, x in groups.act_on_part(g, part, stored).items()}
        _save(self, out, moved, told)


def augment(
    directory: Directory, group: str, scales: tuple[float, float], seed: int, out: Path
) -> groups.Element:
    """Write a random copy of the directory; returns the element that made it.

    Raises UnsupportedError where the group is no symmetry, UsageError where `out` is in use.
    """
    free(out)
    generator = torch.Generator().manual_seed(seed)
    g = groups.sample(group, directory.space, 1, generator, scales)
    told = {"group": group, "seed": seed, "scales": list(scales), "qem": __version__}
    directory.write(g, out, told)
    return g


def free(out: Path) -> None:
    """UsageError unless `out` is a new folder, or an empty one."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out}: it is not empty", "give another --out")


def left_out(path: Path) -> list[str]:
    """What of the folder is not copied: weights in other formats would be those of before."""
    weights = {*_files(path), *SHARDED}
    return sorted(p.name for p in path.iterdir() if p.name not in weights and not _beside(p))


def _beside(path: Path) -> bool:
    return path.is_file() and path.suffix in BESIDE and not path.name.endswith(INDEX)


def _files(path: Path) -> dict[str, tuple[str, ...]]:
    """Weight file -> its tensors."""
    placed = shards(path)
    if not placed:
        file = next(name for name in SINGLE if (path / name).is_file())
        return {file: _names(path / file)}
    files: dict[str, list[str]] = {}
    for name, file in placed.items():
        files.setdefault(file, []).append(name)
    return {file: tuple(names) for file, names in sorted(files.items())}


def _names(file: Path) -> tuple[str, ...]:
    if file.suffix == ".bin":
        return tuple(_pickled(file))
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return tuple(opened.keys())


def _pickled(file: Path) -> dict[str, Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _read(file: Path, names: Iterable[str]) -> dict[str, Tensor]:
    if file.suffix == ".bin":
        tensors = _pickled(file)
        return {name: tensors[name] for name in names}
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in names}


def _save(
    directory: Directory, out: Path, moved: Mapping[str, Tensor], told: Mapping[str, Any]
) -> None:
    """Weights under their old files' names, as safetensors; what stands beside them as it is."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    for path in directory.path.iterdir():
        if _beside(path):
            shutil.copyfile(path, out / path.name)
    header = {"format": "pt", "qem.augment": json.dumps(dict(told))}
    places: dict[str, str] = {}
    total = 0
    for file, names in directory.files.items():
        kept = _read(directory.path / file, [n for n in names if n not in moved])
        tensors = {n: (moved[n] if n in moved else kept[n]).clone() for n in names}
        total += sum(x.numel() * x.element_size() for x in tensors.values())
        places |= dict.fromkeys(names, _renamed(file))
        beside(out / _renamed(file), partial(save_file, tensors, metadata=header))
    if list(directory.files) not in ([name] for name in SINGLE):
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (out / SHARDED[0]).write_text(json.dumps(index, indent=2) + "\n")


def _renamed(file: str) -> str:
    """pytorch_model-00001-of-00002.bin -> model-00001-of-00002.safetensors."""
    return file.removeprefix("pytorch_").replace(".bin", ".safetensors")
