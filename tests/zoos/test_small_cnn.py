"""The Small CNN Zoo byte for byte: every index of every tensor, the row order, both split
conventions against their literal recipes."""

import gzip
import random
import tarfile
import zipfile

import numpy as np
import pandas
import pytest
import torch
from torch.nn import functional as F

from qemcli.errors import InputError, UsageError
from qemcli.functions import respond
from qemcli.zoos.indexing import index
from qemcli.zoos.layouts import small_cnn
from qemcli.zoos.zoo import Zoo

STEPS = ["0", "1", "2", "20", "3", "40", "60", "80", "86"]  # as text, as the file has them
BLOCKS = [
    ("conv2d", (16,), (3, 3, 1, 16)), ("conv2d_1", (16,), (3, 3, 16, 16)),
    ("conv2d_2", (16,), (3, 3, 16, 16)), ("dense", (10,), (16, 10)),
]  # fmt: skip
RUNS = 6


def write(root, runs=RUNS, weights=None, packed=True, paths=True):
    root.mkdir(parents=True, exist_ok=True)
    at, lines = 0, ["varname,start_idx,end_idx,size,shape"]
    for name, bias, kernel in BLOCKS:
        for part, shape in (("bias:0", bias), ("kernel:0", kernel)):
            size = int(np.prod(shape))
            row = f'sequential/{name}/{part},{at},{at + size},{size},"{shape}"'
            lines.append(row)
            at += size
    (root / "layout.csv").write_text("\n".join(lines) + "\n")
    rows = runs * len(STEPS)
    if weights is None:
        weights = np.arange(rows * at, dtype=np.float32).reshape(rows, at)
    np.save(root / "weights.npy", weights)
    table = pandas.DataFrame(
        {
            "config.activation": ["relu" if r % 3 else "tanh" for r in range(runs) for _ in STEPS],
            "config.learning_rate": np.repeat(np.arange(runs) / 100, len(STEPS)),
            "modeldir": [f"/tmp/models/{r:03d}" for r in range(runs) for _ in STEPS],
            "step": [int(s) for _ in range(runs) for s in STEPS],
            "test_accuracy": np.linspace(0.1, 0.9, rows),
            "laststep": [s == "86" for _ in range(runs) for s in STEPS],
        },
        index=[f"/x/{900 + r}/permanent_ckpt-{s}" for r in range(runs) for s in STEPS],
    )
    if not paths:
        table = table.drop(columns="modeldir")
        table.index = range(rows)
    text = table.to_csv()
    file = root / ("metrics.csv.gz" if packed else "metrics.csv")
    file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return weights


def write_split(file, rows, seed=3):
    order = np.random.default_rng(seed).permutation(rows)
    file.write_text("0\n" + "\n".join(map(str, order)) + "\n")
    return order


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("below", ["", "mnist"])
def test_every_parameter_lands_where_torch_has_it(tmp_path, packed, below):
    weights = write(tmp_path / below, packed=packed)
    zoo = Zoo.open(tmp_path)
    assert (zoo.layout, len(zoo)) == ("small_cnn", RUNS * 9)
    space, flat, positions = next(zoo.load(rows=[20]))
    assert positions.tolist() == [20]
    w = {n: t[0].numpy() for n, t in space.unflatten(flat).items()}
    at = 0
    for name, bias, kernel in BLOCKS:
        np.testing.assert_array_equal(
            w[f"sequential/{name}/bias:0"], weights[20, at : at + bias[0]]
        )
        at += bias[0]
        found = w[f"sequential/{name}/kernel:0"]
        for place in (
            (0,) * len(kernel),
            tuple(n - 1 for n in kernel),
            tuple(n // 2 for n in kernel),
        ):
            there = at + np.ravel_multi_index(place, kernel)
            here = (place[3], place[2], place[0], place[1]) if len(kernel) == 4 else place[::-1]
            assert found[here] == weights[20, there]
        at += int(np.prod(kernel))
    assert at == space.size == 4970


def test_network_is_run_with_stride_two_and_no_padding(tmp_path):
    rng = np.random.default_rng(0)
    weights = write(tmp_path, 1, rng.standard_normal((9, 4970)).astype(np.float32) / 4)
    space, flat, _ = next(Zoo.open(tmp_path).load())
    x = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    found = respond(space, space.unflatten(flat), x)[4]
    h, at = x, 0
    for _, bias, kernel in BLOCKS[:3]:  # TF's arithmetic, written out on HWIO
        b = torch.from_numpy(weights[4, at : at + 16])
        k = torch.from_numpy(weights[4, at + 16 : at + 16 + int(np.prod(kernel))]).reshape(kernel)
        at += bias[0] + k.numel()
        patches = h.unfold(2, 3, 2).unfold(3, 3, 2)  # b c y x u v
        h = torch.tanh(torch.einsum("bcyxuv,uvco->boyx", patches, k) + b[:, None, None])
    dense = torch.from_numpy(weights[4, 4810:]).reshape(16, 10)
    expected = h.mean(dim=(2, 3)) @ dense + torch.from_numpy(weights[4, 4800:4810])
    torch.testing.assert_close(found, expected)
    assert F.mse_loss(found, expected.flip(0)) > 1e-4


@pytest.mark.parametrize("paths", [True, False])
def test_rows_are_runs_of_nine_with_steps_sorted_as_text(tmp_path, paths):
    write(tmp_path, paths=paths)
    table = Zoo.open(tmp_path).index
    assert table["run"].nunique() == RUNS
    assert (table.groupby("run")["row"].max() - table.groupby("run")["row"].min() == 8).all()
    assert table["step"].tolist() == [int(s) for s in STEPS] * RUNS
    assert table.loc[table["final"], "row"].tolist() == [9 * r + 8 for r in range(RUNS)]
    assert table["checkpoint"].is_unique
    assert table["activation"].tolist()[::9] == ["tanh", "relu", "relu"] * 2
    if paths:
        assert table["checkpoint"][3] == "900/step-00020"


def literal(metrics, order, activation, convention):
    """The papers' recipe on the csv as they read it, header row and all."""
    perm = np.concatenate([[0], order])
    steps, acts = metrics["step"].to_numpy()[perm], metrics["activation"].to_numpy()[perm]
    keep = steps == 86
    if convention == "monomial-nfn":
        keep &= acts == activation
    finals = perm[keep]
    n = len(finals)
    trainval = list(range(n // 2))
    random.Random(0).shuffle(trainval)
    cut = int(0.8 * len(trainval))
    parts = {
        "train": finals[trainval[:cut]], "val": finals[trainval[cut:]], "test": finals[n // 2 :]
    }  # fmt: skip
    if convention == "scalegmn":
        acts = metrics["activation"].to_numpy()
        parts = {name: rows[acts[rows] == activation] for name, rows in parts.items()}
    return parts


@pytest.mark.parametrize("convention", ["nfn", "monomial-nfn", "scalegmn"])
def test_splits_are_those_of_the_papers_code(tmp_path, convention):
    write(tmp_path, 40, np.zeros((360, 4970), np.float32))
    order = write_split(tmp_path / "mnist_split.csv", 360)
    table = Zoo.open(tmp_path).index
    activation = None if convention == "nfn" else "relu"
    found = small_cnn.splits(
        table, small_cnn.permutation(tmp_path / "mnist_split.csv"), convention, activation
    )
    expected = literal(table, order, activation, convention)
    for name in ("train", "val", "test"):
        assert found[name].tolist() == expected[name].tolist()
    assert not set(found["train"]) & set(found["test"])


def test_the_two_conventions_differ_and_the_split_beside_the_weights_is_taken(tmp_path):
    write(tmp_path, 40, np.zeros((360, 4970), np.float32))
    write_split(tmp_path / "mnist_split.csv", 360)
    table = Zoo.open(tmp_path).index
    order = small_cnn.permutation(tmp_path / "mnist_split.csv")
    one = small_cnn.splits(table, order, "monomial-nfn", "relu")
    other = small_cnn.splits(table, order, "scalegmn", "relu")
    assert set(one["test"]) != set(other["test"])
    assert table["split"].value_counts().to_dict() == {"test": 20, "train": 16, "val": 4}
    assert table.loc[table["split"].notna(), "final"].all()
    with pytest.raises(UsageError, match="convention"):
        small_cnn.splits(table, order, "other")


def test_split_file_that_is_no_permutation_is_refused(tmp_path):
    for text in ("0\n1\n1\n0\n", "0\nx\n", "0\n5\n0\n"):
        (tmp_path / "s.csv").write_text(text)
        with pytest.raises(UsageError):
            small_cnn.permutation(tmp_path / "s.csv")


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    write(tmp_path)
    layout = (tmp_path / "layout.csv").read_text()
    np.save(tmp_path / "weights.npy", np.zeros((RUNS * 9, 4971), np.float32))
    with pytest.raises(InputError, match="4970 parameters"):
        Zoo.open(tmp_path)
    np.save(tmp_path / "weights.npy", np.zeros((RUNS * 9 - 1, 4970), np.float32))
    with pytest.raises(InputError, match="54 rows, weights 53"):
        Zoo.open(tmp_path)
    np.save(tmp_path / "weights.npy", np.array([[object()]]), allow_pickle=True)
    with pytest.raises(InputError, match="damaged"):
        Zoo.open(tmp_path)
    canary = tmp_path / "canary"
    evil = f'"__import__(""pathlib"").Path(""{canary}"").touch()"'
    np.save(tmp_path / "weights.npy", np.zeros((RUNS * 9, 4970), np.float32))
    (tmp_path / "layout.csv").write_text(layout.replace('"(16,)"', evil, 1))
    with pytest.raises(InputError, match="not the layout"):
        Zoo.open(tmp_path)
    assert not canary.exists()


def test_index_of_it_is_read_through_the_array(tmp_path):
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((18, 4970)).astype(np.float32)
    weights[3, 5] = np.nan
    write(tmp_path / "z", 2, weights)
    summary = index(tmp_path / "z", out=tmp_path / "out")
    assert (summary["checkpoints"], summary["finite"], summary["failed"]) == (18, 17, [])
    own, again = Zoo.open(tmp_path / "z"), Zoo.open(tmp_path / "out", statistics=True)
    assert again.index["checkpoint"].tolist() == own.index["checkpoint"].tolist()
    assert again.index["finite"].tolist() == [i != 3 for i in range(18)]
    np.testing.assert_allclose(
        again.index["stat.sequential/dense/bias:0.mean"], weights[:, 4800:4810].mean(1), rtol=1e-5
    )
    for (_, a, _), (_, b, _) in zip(own.load(), again.load(), strict=True):
        assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


@pytest.mark.parametrize("kind", ["tar", "tar.xz", "zip"])
def test_archive_is_read_in_place(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("QEM_CACHE", str(tmp_path / "cache"))
    weights = write(tmp_path / "mnist", 2)
    path = tmp_path / f"mnist.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in (tmp_path / "mnist").iterdir():
                archive.write(file, f"mnist/{file.name}")
    else:
        with tarfile.open(path, "w:" + kind.partition(".")[2]) as archive:
            archive.add(tmp_path / "mnist", "mnist")
    own, packed = Zoo.open(tmp_path / "mnist"), Zoo.open(path)
    assert (packed.layout, packed.name) == ("small_cnn", "mnist")
    assert packed.index.equals(own.index)
    for (_, a, _), (_, b, _) in zip(own.load(), packed.load(), strict=True):
        assert torch.equal(a, b)
    assert float(next(packed.load(rows=[4]))[1].max()) == weights[4].max()
    assert index(path, out=tmp_path / "out")["checkpoints"] == 18
    if kind != "tar.xz":
        data = path.read_bytes()
        path.write_bytes(data.replace(b"'shape': (18, 4970)", b"'shape': (99, 4970)"))
        with pytest.raises(InputError, match=r"cut short or damaged"):
            Zoo.open(path)
