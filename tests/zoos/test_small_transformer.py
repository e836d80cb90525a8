"""The Small Transformer Zoo: both archives, from the zip and from folders, made by code."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch

from qemcli.errors import InputError, UsageError
from qemcli.spaces import Transformer, small_transformer
from qemcli.zoos.indexing import index
from qemcli.zoos.layouts.small_transformer import BEST, splits
from qemcli.zoos.opening import open_zoo
from qemcli.zoos.zoo import Zoo, layout_of

MNIST = small_transformer(6, 2, 7, 2, 10, (1, 4))
TEXT = small_transformer(6, 2, 7, 2, 4)
RUNS = [f"{i:08x}" for i in range(12)]


def network(space: Transformer, seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    w = {n: torch.randn(*s, generator=rng) for n, s in space.shapes.items()}
    if space is MNIST:
        w = {"embedding.pos_embedding": torch.ones(49, 6), **w}
    return w


def files(data: str, space: Transformer) -> dict[str, bytes]:
    """Two epochs and the best of every run, a table, and what else lies there."""
    found, rows = {}, []
    for i, run in enumerate(RUNS):
        for j, epoch in enumerate(("50", "75", "best1")):
            name = f"{run}_{epoch}_{1000 + 50 * i + j}.pt"
            buffer = io.BytesIO()
            torch.save(network(space, 10 * i + j), buffer)
            found[f"{data}/{name}"] = buffer.getvalue()
            doubled = f"{data}/model/{data}/{name}" if epoch == "best1" else f"{data}/{name}"
            rows.append({
                "seed": 3, "optimizer": ("adam", "sgd")[i % 2], "lr": 10.0 ** -(1 + i // 4),
                "w_init_std": 0.1, "l2_regularize": 1e-8 * (i + 1), "train_fraction": 1.0,
                "dropout": 0.1, "ckpt_epoch": epoch, "ckpt_file": doubled,
                "test_top1_accuracy": (1000 + 50 * i + j) / 1e4 + 3e-5,
            })  # fmt: skip
    table = pandas.DataFrame(rows[1:])  # the first file has no row
    if data == "ag_news":
        table = table.rename(columns={"test_top1_accuracy": "test_accuracy"})
    found[f"metadata/{data}.csv"] = table.to_csv(index=False).encode()
    found[f"{data}/embedding.pt"] = b"frozen"
    found[f"{data}/notaname.pt"] = b"x"
    found["README.md"] = b"read me"
    return found


def lay(path: Path, held: dict[str, bytes], top: str = "") -> Path:
    """As a folder, or as a zip where the path says so."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in held.items():
                archive.writestr(top + name, data)
        return path
    for name, data in held.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


@pytest.mark.parametrize("place", ["MNIST-Transformers.zip", "mnist_transformer"])
@pytest.mark.parametrize(("data", "space"), [("mnist", MNIST), ("ag_news", TEXT)])
def test_both_archives_are_read_in_place(place: str, data: str, space: Any, tmp_path: Path) -> None:
    path = lay(tmp_path / place, files(data, space), "MNIST-Transformers/")
    assert layout_of(path) == "small_transformer"
    zoo = Zoo.open(path)
    assert len(zoo) == 36
    (found, flat, positions), *rest = zoo.load()
    assert not rest
    assert found == space
    assert found.heads[0] == (2, 1, 3, 3)
    for row, at in zip(flat, positions, strict=True):
        run, epoch, _ = zoo.index["checkpoint"][at].rpartition("/")[2].split("_")
        j = ("50", "75", "best1").index(epoch)
        w = network(space, 10 * RUNS.index(run) + j)
        assert torch.equal(row, torch.cat([w[n].flatten() for n in space.names]))


def test_labels_and_epochs_come_from_the_table_then_from_the_name(tmp_path: Path) -> None:
    held = files("mnist", MNIST)
    zoo = Zoo.open(lay(tmp_path / "z.zip", held))
    table = zoo.index.set_index(["run", "ckpt_epoch"]).sort_index()
    assert table.loc[(RUNS[0], "50"), "test_accuracy"] == 0.1  # no row: by the name
    assert table.loc[(RUNS[1], "75"), "test_accuracy"] == pytest.approx(0.10513)
    assert table.loc[(RUNS[2], "best1"), "config.lr"] == pytest.approx(0.1)
    assert np.isnan(table.loc[(RUNS[0], "50"), "config.lr"])
    assert sorted(set(zoo.index["epoch"])) == [BEST, 50, 75]
    assert zoo.record["labels"] == {
        "file": "metadata/mnist.csv", "without_row": 1, "other_accuracy_than_the_name": 0,
    }  # fmt: skip


def test_what_is_no_network_is_named(tmp_path: Path) -> None:
    held = files("mnist", MNIST)
    held |= {"../mnist/aaaaaaaa_75_1.pt": b"x", "ag_news/aaaaaaaa_75_2500.pt": b"x"}
    zoo = Zoo.open(lay(tmp_path / "z.zip", held))
    assert {f["checkpoint"]: f["reason"] for f in zoo.failures} == {
        "mnist/notaname.pt": "its name is not <run>_<epoch>_<accuracy>.pt",
        "../mnist/aaaaaaaa_75_1.pt": "its name points out of the archive",
    }
    assert {item["name"]: item["reason"] for item in zoo.record["left_out"]} == {
        "mnist/embedding.pt": "the word vectors that all networks share, frozen",
        "README.md": "no network's name",
        "ag_news/aaaaaaaa_75_2500.pt": "networks of another data set than mnist",
    }


def test_a_damaged_network_is_a_failure_and_the_rest_is_read(tmp_path: Path) -> None:
    held = files("mnist", MNIST)
    held[f"mnist/{RUNS[3]}_75_1151.pt"] = b"<html>not here"
    zoo = Zoo.open(lay(tmp_path / "z", held))
    assert sum(len(flat) for _, flat, _ in zoo.load()) == 35
    assert any("a web page" in f["reason"] for f in zoo.failures)


def test_a_zoo_without_its_table_has_the_labels_of_the_names(tmp_path: Path) -> None:
    held = {n: d for n, d in files("mnist", MNIST).items() if not n.endswith(".csv")}
    zoo = Zoo.open(lay(tmp_path / "z.zip", held))
    assert zoo.record["labels"] == {"without_row": 36}
    assert zoo.index["test_accuracy"].min() == 0.1
    runs = zoo.index.groupby("run")["split"].nunique()
    assert (runs == 1).all()


@pytest.mark.parametrize(
    ("table", "reason"), [(b"a,b\n1,2\n", "no column 'ckpt_file'"),
    (b"ckpt_file,test_accuracy\nmnist/x.pt,high\n", "holds what is no number"),
    (b"", "not a readable table")]
)  # fmt: skip
def test_a_table_that_is_none_is_refused(table: bytes, reason: str, tmp_path: Path) -> None:
    held = {**files("mnist", MNIST), "metadata/mnist.csv": table}
    with pytest.raises(InputError, match=reason):
        Zoo.open(lay(tmp_path / "z.zip", held))


def test_index_keeps_labels_and_reads_from_the_archive(tmp_path: Path) -> None:
    path = lay(tmp_path / "z.zip", files("mnist", MNIST))
    summary = index(path, out=tmp_path / "indexed")
    assert (summary["checkpoints"], summary["labelled"]) == (36, 36)
    zoo = Zoo.open(tmp_path / "indexed").where("ckpt_epoch == '75'")
    assert len(zoo) == 12
    (space, flat, _), *_ = zoo.load()
    assert isinstance(space, Transformer)
    assert flat.shape == (12, MNIST.size)


def test_a_recipe_takes_the_published_split(tmp_path: Path) -> None:
    path = lay(tmp_path / "z.zip", files("mnist", MNIST))
    zoo = open_zoo(path, splits="published")
    assert set(zoo.index["ckpt_epoch"]) == {"75"}
    assert zoo.index["split"].tolist() == zoo.index["published"].tolist()
    assert len(open_zoo(path).index) == 36
    with pytest.raises(UsageError, match="no column 'run' of train, val and test"):
        open_zoo(path, splits="run")


def table(count: int) -> pandas.DataFrame:
    """An index of networks of epoch 75 and 100, with 40 configurations."""
    rng = np.random.default_rng(0)
    place = np.arange(count) % 40
    rows = {
        "checkpoint": [f"mnist/{i:08x}_75_1.pt" for i in range(count)], "ckpt_epoch": "75",
        "run": [f"{i:08x}" for i in range(count)], "test_accuracy": rng.random(count),
        "config.optimizer": np.array(["adam", "sgd"])[place % 2], "config.lr": place // 2,
        "config.init_std": 0.1,
    }  # fmt: skip
    one = pandas.DataFrame(rows)
    return pandas.concat([one, one.assign(ckpt_epoch="100")], ignore_index=True)


@pytest.mark.parametrize(
    ("count", "sizes"), [(15_689, (10_982, 2_353, 2_354)), (15_949, (11_164, 2_392, 2_393))]
)
def test_the_published_recipe_has_the_published_sizes(count: int, sizes: tuple[int, ...]) -> None:
    rows = table(count)
    found = splits(rows, "published")
    assert tuple((found == part).sum() for part in ("train", "val", "test")) == sizes
    assert all(f is None for f in found[count:])  # epoch 100
    assert not np.array_equal(found, splits(rows, "published", seed=1))
    high = splits(rows, "published", cut=0.8)
    assert rows["test_accuracy"][pandas.notna(high)].min() >= 0.8
    mixed = rows.iloc[np.random.default_rng(1).permutation(len(rows))].reset_index(drop=True)
    again = dict(zip(mixed["checkpoint"], splits(mixed, "published"), strict=True))
    assert again["mnist/00000007_75_1.pt"] in ("train", "val", "test", None)


def test_our_recipe_keeps_a_configuration_on_one_side() -> None:
    rows = table(400)
    rows["split"] = splits(rows)
    sides = rows.groupby(["config.optimizer", "config.lr"])["split"].nunique()
    assert (sides == 1).all()
    counts = rows["split"].value_counts(normalize=True)
    assert (counts["train"], counts["val"], counts["test"]) == pytest.approx((0.7, 0.15, 0.15))
    published = rows.assign(split=splits(rows, "published")).dropna(subset="split")
    sides = published.groupby(["config.optimizer", "config.lr"])["split"].nunique()
    assert (sides > 1).any()  # the published recipe does not
    with pytest.raises(UsageError, match="no recipe 'random'"):
        splits(rows, "random")
