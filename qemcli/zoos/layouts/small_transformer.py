"""The Small Transformer Zoo (Tran et al. 2025, arXiv:2410.04209), byte for byte, from a folder or
the .zip itself.

mnist/<run>_<epoch>_<accuracy>.pt beside metadata/mnist.csv, and ag_news/... beside
metadata/ag_news.csv; the epoch is 1, 50, 75, 100 or `best`, the accuracy counts 1/10000. The split
keeps near twins, the runs of one optimizer, learning rate and initial spread, on one side; the
column `published` has the papers' split, of the networks of epoch 75 alone.
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qemcli.errors import InputError, UsageError
from qemcli.formats._alike import Alike
from qemcli.formats._torch_pickles import BROKEN
from qemcli.spaces import Transformer, transformer_of
from qemcli.zoos import sources
from qemcli.zoos.layouts._usual import usual
from qemcli.zoos.members import Folder, Member, Tree, first_names, tree
from qemcli.zoos.zoo import Zoo

if TYPE_CHECKING:
    import pandas

HEADS = 2  # of every network in both archives; no tensor says it
BEST = -1  # the epoch of the checkpoints that were best on the test set
NAME = re.compile(r"(?:^|/)(mnist|ag_news)/([0-9a-z]{4,16})_(\d{1,4}|best\d?)_(\d{1,5})\.pt$")
MINE = re.compile(r"(?:^|/)(mnist|ag_news)/[^/]+\.pt$")
TABLE = re.compile(r"(?:^|/)metadata/(mnist|ag_news)\.csv$")
LARGEST = 256 << 20  # bytes of a table
ACCURACY = ("test_top1_accuracy", "test_accuracy")
CONFIG = {  # what the published tables call what our own zoos call otherwise
    "optimizer": "config.optimizer", "lr": "config.lr", "w_init_std": "config.init_std",
    "l2_regularize": "config.l2", "train_fraction": "config.train_fraction",
    "dropout": "config.dropout", "batch_size": "config.batch_size", "seed": "seed",
}  # fmt: skip
TWINS = ("config.optimizer", "config.lr", "config.init_std")  # a configuration
RECIPES = ("configuration", "published")
PARTS, SHARES = ("train", "val", "test"), (0.7, 0.85)


class Network(NamedTuple):
    """What a file's name says: data set, run, epoch as text, accuracy in 1/10000."""

    data: str
    run: str
    epoch: str
    accuracy: int


@dataclass
class Found:
    """The networks of a tree, its tables, what failed and what was left out."""

    path: Path
    tree: Tree
    networks: dict[str, tuple[Member, Network]] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def take(self, member: Member) -> None:
        """Sort one file in."""
        name = _named(self.path, member.name)
        table, told = TABLE.search(name), NAME.search(name)
        if "__MACOSX" in name or name.rpartition("/")[2].startswith("."):
            return self.leave_out("what the system puts into archives", member.name)
        if table and (member.reason is None or member.reason.startswith("claims")):
            self.tables[table[1]] = member.name
        elif member.reason is not None:
            self.fail(member.name, member.reason)
        elif told:
            network = Network(told[1], told[2], told[3], int(told[4]))
            self.networks[member.name] = member, network
        elif name.endswith("/embedding.pt"):
            self.leave_out("the word vectors that all networks share, frozen", member.name)
        elif MINE.search(name):
            self.fail(member.name, "its name is not <run>_<epoch>_<accuracy>.pt")
        else:
            self.leave_out("no network's name", member.name)
        return None

    def fail(self, name: str, reason: str) -> None:
        """Name a file that is no network."""
        self.failures.append({"checkpoint": name, "reason": reason})

    def leave_out(self, reason: str, name: str) -> None:
        """Name a file that nobody takes for a network."""
        self.left_out.setdefault(reason, []).append(name)


def _named(path: Path, name: str) -> str:
    """A folder may be given without its parents."""
    return f"{path.resolve().name if path.is_dir() else path.stem}/{name}"


def sniff(path: Path) -> bool:
    """A folder or an archive with networks of such names."""
    return any(NAME.search(_named(path, name)) for name in first_names(path))


def open(path: Path, activation: str | None = None, statistics: bool = False) -> Zoo:
    """The zoo of one data set; what else lies there is left out and named.

    Raises InputError where not one network can be read, or where the table is no table.
    """
    lies = tree(path)
    if lies is None:
        raise InputError(f"{path}: neither a folder nor a tar nor a zip")
    found = Found(path, lies)
    for member in lies.members():
        found.take(member)
    counted = Counter(network.data for _, network in found.networks.values())
    data = next(iter(counted.most_common(1)), ("", 0))[0]
    for name in [n for n, (_, network) in found.networks.items() if network.data != data]:
        found.leave_out(f"networks of another data set than {data}", name)
        del found.networks[name]
    space = _space(found)
    index, report = _index(found, data)
    arch = sources.arch_key(space)
    index.insert(2, "arch", arch)
    index["activation"], index["parameters"] = "relu", np.int32(space.size)
    index["split"], index["published"] = splits(index), splits(index, "published")
    found.failures.sort(key=lambda item: item["checkpoint"])
    listed = [{"name": n[0], "files": len(n), "reason": r} for r, n in found.left_out.items()]
    record = {
        "name": path.resolve().stem, "paper": "arXiv:2410.04209", "data": data,
        "splits": "70/15/15 by optimizer, lr and init_std, drawn with seed 0", "labels": report,
        "left_out": listed,
    }  # fmt: skip
    source = sources.members(path)
    return Zoo(index, {arch: space}, source, path, "small_transformer", record, found.failures)


def _space(found: Found) -> Transformer:
    """The space that most of the first networks have."""
    reader = Alike(HEADS)
    one = usual(
        "networks",
        found.path,
        found.networks,
        lambda name: reader.read(found.tree.read(found.networks[name][0]))[0].space,
        found.failures,
    )
    return transformer_of(one, "a Small Transformer Zoo")


def _index(found: Found, data: str) -> tuple[pandas.DataFrame, dict[str, Any]]:
    """(index, how the table met the files): labels from the table, else from the name."""
    import pandas

    names = sorted(found.networks)
    members = pandas.DataFrame([found.networks[n][0] for n in names], columns=Member._fields)
    told = pandas.DataFrame([found.networks[n][1] for n in names], columns=Network._fields)
    epochs = [BEST if e.startswith("best") else int(e) for e in told["epoch"]]
    index = pandas.DataFrame({
        "uid": np.arange(len(names)), "checkpoint": names, "file": names, "run": told["run"],
        "epoch": np.array(epochs, dtype=np.int32), "ckpt_epoch": told["epoch"],
        "final": told["epoch"] == "100", "test_accuracy": told["accuracy"] / 10_000,
    })  # fmt: skip
    report: dict[str, Any] = {"without_row": len(names)}
    if data in found.tables:
        table = _table(found, data).reindex([n.rpartition("/")[2] for n in names])
        stated = table["test_accuracy"].to_numpy(dtype=float)
        known = np.isfinite(stated)
        apart = np.abs(stated[known] - index["test_accuracy"][known]) > 1.5e-4
        report = {
            "file": found.tables[data], "without_row": int((~known).sum()),
            "other_accuracy_than_the_name": int(apart.sum()),
        }  # fmt: skip
        index["test_accuracy"] = np.where(known, stated, index["test_accuracy"])
        for column in CONFIG.values():
            if column in table:
                index[column] = table[column].to_numpy()
    columns = {name: members[name] for name in ("size", "offset", "packed")}
    return index.assign(**columns), report


def _table(found: Found, data: str) -> pandas.DataFrame:
    """The published table, by the files' names; a name that stands twice counts once."""
    import pandas

    where = f"{found.path}: {found.tables[data]}"
    try:
        with _text(found, data) as file:
            table = pandas.read_csv(file, dtype={"ckpt_epoch": str}, low_memory=False)
    except (*BROKEN, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: not a readable table ({error})", "fetch it again") from None
    label = next((name for name in ACCURACY if name in table), None)
    lacking = "ckpt_file" if "ckpt_file" not in table else label or ACCURACY[0]
    if lacking not in table:
        raise InputError(f"{where}: no column '{lacking}'", "fetch it again")
    if not pandas.api.types.is_numeric_dtype(table[label]):
        raise InputError(f"{where}: '{label}' holds what is no number", "fetch it again")
    table.index = table["ckpt_file"].astype(str).str.rpartition("/")[2]
    kept = {lacking: "test_accuracy", **{k: v for k, v in CONFIG.items() if k in table}}
    table = table[list(kept)].rename(columns=kept)
    return table[~table.index.duplicated()]


@contextmanager
def _text(found: Found, data: str) -> Iterator[IO[bytes]]:
    name = found.tables[data]
    if isinstance(found.tree, Folder):
        with (found.path / name).open("rb") as file:
            yield file
        return
    with zipfile.ZipFile(found.path) as archive:
        if archive.getinfo(name).file_size > LARGEST:
            raise InputError(f"{found.path}: {name} is larger than a table of this zoo can be")
        with archive.open(name) as file:
            yield file


def splits(
    index: pandas.DataFrame,
    recipe: str = "configuration",
    cut: float = 0.0,
    seed: int = 0,
    epoch: str = "75",
) -> np.ndarray:
    """train, val, test or None for every row.

    `configuration`: 70/15/15 of the configurations (TWINS), all checkpoints of all their runs on
    one side. `published`: the networks of one epoch with an accuracy of at least `cut`, shuffled;
    70 % and 15 % rounded down, the rest. The published code did not seed it: here `seed` does, over
    sorted names. Raises UsageError for another recipe.
    """
    if recipe not in RECIPES:
        raise UsageError(f"no recipe '{recipe}'", f"known: {', '.join(RECIPES)}")
    out = np.full(len(index), None, dtype=object)
    rng = np.random.default_rng(seed)
    if recipe == "published":
        kept = (index["ckpt_epoch"] == epoch) & (index["test_accuracy"] >= cut)
        rows = index.index[kept][np.argsort(index["checkpoint"][kept].to_numpy(), kind="stable")]
        rows = rng.permutation(rows.to_numpy())
        ends = [int(0.7 * len(rows)), int(0.7 * len(rows)) + int(0.15 * len(rows))]
        for part, chosen in zip(PARTS, np.split(rows, ends), strict=True):
            out[chosen] = part
        return out
    keys = _configurations(index)
    cells = {key: i for i, key in enumerate(sorted(set(keys)))}
    rank = np.empty(len(cells))
    rank[rng.permutation(len(cells))] = (np.arange(len(cells)) + 0.5) / max(len(cells), 1)
    place = np.array([cells[key] for key in keys], dtype=int)
    out[:] = np.array(PARTS, dtype=object)[np.digitize(rank[place], SHARES)]
    return out


def _configurations(index: pandas.DataFrame) -> list[str]:
    """The configuration of every row; its run where the table does not say it."""
    runs = index["run"].tolist()
    columns = [index[name].tolist() for name in TWINS if name in index]
    if not columns:
        return runs
    rows = zip(*columns, strict=True)
    return [
        run if any(value != value for value in row) else str(row)
        for run, row in zip(runs, rows, strict=True)
    ]
