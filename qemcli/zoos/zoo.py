"""Zoo: a set of checkpoints with its index; weights are read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qemcli import registry
from qemcli.errors import UsageError
from qemcli.spaces import Opaque, WeightSpace
from qemcli.zoos.sources import Source
from qemcli.zoos.where import rows as where_rows

if TYPE_CHECKING:
    import pandas
    from torch import Tensor


@dataclass(frozen=True)
class Zoo:
    """Checkpoints and what is known of them.

    Attributes:
        index: one row a checkpoint (columns: the index schema of indexing.py).
        spaces: arch id -> weight space; a row's own `activation` goes before its space's.
        source: reads the weights of rows of the index.
        path: where it lies.
        layout: the module of zoos/layouts that opened it.
        record: what zoo.json or the card says (name, licence, recipe, ...).
        failures: {"checkpoint", "reason"} of what could not be read; `load` adds to it.
        copies: opens the zoo with the augmented copies that its layout leaves out, which `where`
        does for a filter over the column `augmented`.
    """

    index: pandas.DataFrame
    spaces: dict[str, WeightSpace]
    source: Source
    path: Path
    layout: str
    record: dict[str, Any] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    copies: Callable[[], Zoo] | None = None

    @classmethod
    def open(cls, path: str | Path, activation: str | None = None, statistics: bool = False) -> Zoo:
        """Open whatever lies at `path`: our layout, an index.parquet, a published layout, a folder
        of checkpoints, one checkpoint; or a name from zoos/, or hf://.

        `activation` is what the networks use where no file says it; `statistics` also reads the
        `stat.` columns of an index. Raises UsageError where nothing is there, InputError where
        nothing can be read.
        """
        from qemcli.zoos.resolve import locate

        where = locate(path)
        layout = registry.load("zoos.layouts", layout_of(where))
        return layout.open(where, activation=activation, statistics=statistics)._stated(activation)

    def _stated(self, activation: str | None) -> Zoo:
        """With the caller's activation where none is known."""
        if activation is None or "activation" not in self.index:
            return self
        from qemcli.recognition import known_activation

        filled = self.index["activation"].fillna(known_activation(activation))
        return replace(self, index=self.index.assign(activation=filled))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def name(self) -> str:
        return str(self.record.get("name") or self.path.stem)

    def take(self, positions: Any) -> Zoo:
        """The zoo of these rows of the index (positions or a mask), numbered anew."""
        return replace(self, index=self.index.iloc[positions].reset_index(drop=True), copies=None)

    def understood(self) -> Zoo:
        """The zoo without the checkpoints that an index only lists: those become failures."""
        reasons = {a: s.title for a, s in self.spaces.items() if isinstance(s, Opaque)}
        listed = self.index["arch"].isin(list(reasons)).to_numpy()
        if not listed.any():
            return self
        rows = self.index[listed]
        named = [
            {"checkpoint": name, "reason": reasons[arch]}
            for name, arch in zip(rows["checkpoint"], rows["arch"], strict=True)
        ]
        return replace(self.take(~listed), failures=[*self.failures, *named], copies=self.copies)

    def where(self, expression: str) -> Zoo:
        """The rows for which the filter holds: `zoo.where("lr < 0.1 and step == 86")`."""
        asked = self.copies is not None and "augmented" in expression
        zoo = self.copies() if self.copies is not None and asked else self
        return zoo.take(np.flatnonzero(where_rows(zoo.index, expression)))

    def split(self, name: str) -> Zoo:
        """The rows whose split is `name`; UsageError where there is none."""
        known = self.index["split"].dropna().unique().tolist() if "split" in self.index else []
        if name not in known:
            hint = f"its splits: {', '.join(map(str, known))}" if known else "it has no splits"
            raise UsageError(f"{self.path}: no split is called '{name}'", hint)
        return self.take(np.flatnonzero(self.index["split"].to_numpy() == name))

    def limit(self, count: int) -> Zoo:
        """The first `count` rows."""
        return self.take(slice(count))

    def groups(self) -> Iterator[tuple[WeightSpace, np.ndarray]]:
        """(weight space, positions in the index) for each architecture and activation."""
        if not len(self.index):
            return
        keys = ["arch", "activation"] if "activation" in self.index else ["arch"]
        grouped = self.index.groupby(keys, dropna=False, sort=False).indices
        for key, positions in grouped.items():
            arch, *rest = key if isinstance(key, tuple) else (key,)
            known = rest[0] if rest and isinstance(rest[0], str) else None
            yield self.spaces[arch].running(known), np.sort(positions)

    def load(self, rows: Any = None) -> Iterator[tuple[WeightSpace, Tensor, np.ndarray]]:
        """(weight space, (n, D) float32, positions in the index) for each architecture and
        activation; only `rows` (positions) where given. What cannot be read is left out and named
        in `failures`."""
        wanted = None if rows is None else np.asarray(rows)
        for space, positions in self.groups():
            kept = positions if wanted is None else positions[np.isin(positions, wanted)]
            yield from self._read(space, kept)

    def batches(self, size: int = 1024) -> Iterator[tuple[WeightSpace, Tensor, np.ndarray]]:
        """As `load`, at most `size` networks at a time: memory does not grow with the zoo."""
        for space, positions in self.groups():
            for start in range(0, len(positions), size):
                yield from self._read(space, positions[start : start + size])

    def balanced(self, positions: np.ndarray) -> Tensor | None:
        """(n, D) float32, the balanced representatives that `qem index --balanced` keeps of rows of
        one architecture and activation; None where they are not kept."""
        import torch

        from qemcli.zoos.balanced import FOLDER, read

        folder = (self.path if self.path.is_dir() else self.path.parent) / FOLDER
        found = read(folder, self.index.iloc[positions]) if folder.is_dir() else None
        return None if found is None else torch.from_numpy(found)

    def _read(
        self, space: WeightSpace, positions: np.ndarray
    ) -> Iterator[tuple[WeightSpace, Tensor, np.ndarray]]:
        """Once, or not at all where none of them can be read."""
        import torch

        if not len(positions):
            return
        table = self.index.iloc[positions]
        flat, bad = self.source(space, table)
        if bad:
            names = table["checkpoint"].tolist()
            found = [{"checkpoint": names[i], "reason": reason} for i, reason in bad.items()]
            known = {item["checkpoint"] for item in self.failures}  # it may be read twice
            self.failures.extend(item for item in found if item["checkpoint"] not in known)
            good = np.array([i for i in range(len(table)) if i not in bad], dtype=int)
            flat, positions = flat[good], positions[good]
        if len(positions):
            yield space, torch.from_numpy(np.ascontiguousarray(flat)), positions


def layout_of(path: Path) -> str:
    """The name of the layout that claims what lies at `path`; UsageError where none does."""
    for name in sorted(registry.names("zoos.layouts"), key=_rank):
        if registry.load("zoos.layouts", name).sniff(path):
            return name
    raise UsageError(f"{path}: neither a zoo nor a checkpoint")


def _rank(layout: str) -> tuple[bool, bool, bool, str]:
    """An index goes before what it was made from; a plain archive and a plain folder are asked
    last: every zoo lies in one."""
    return layout in ("folder", "single"), layout == "archive", layout != "indexed", layout
