"""Zoos of training runs as published: ModelZoos and the CNN Wild Park, as folders and archives;
what is a pickle of somebody else's is never opened."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from qemcli.errors import InputError
from qemcli.functions import respond
from qemcli.groups import applicable
from qemcli.spaces import Chain, Opaque, Residual
from qemcli.zoos.indexing import index
from qemcli.zoos.opening import open_zoo
from qemcli.zoos.zoo import Zoo


def saved(tree):
    out = io.BytesIO()
    torch.save(tree, out)
    return out.getvalue()


def pack(files, root, kind):
    """The files as a folder, or as an archive with the folder inside; what a user would name."""
    top = next(iter(files)).split("/")[0]
    if kind == "folder":
        for name, data in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        return root / top
    if kind == "zip":
        path = root / "some_other_name.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    path = root / f"zoo.{kind}"
    with tarfile.open(path, "w:" + kind.partition(".")[2]) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


class Canary:
    """A pickle of it touches a file where it is run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def cnn_s(seed, dropout=False):
    """The published small CNN, scaled down: keys shift where dropout stands between."""
    rng = torch.Generator().manual_seed(seed)
    at = [0, 4, 8, 11, 14] if dropout else [0, 3, 6, 9, 11]
    shapes = [(4, 1, 5, 5), (3, 4, 5, 5), (2, 3, 2, 2), (6, 18), (10, 6)]
    made = OrderedDict()
    for i, shape in zip(at, shapes, strict=True):
        made[f"module_list.{i}.weight"] = torch.randn(shape, generator=rng)
        made[f"module_list.{i}.bias"] = torch.randn(shape[0], generator=rng)
    return made


EPOCHS = (0, 1, 50)


def ray_tune(tmp_path, padded=True):
    """Three trials of three epochs: one with dropout, one without scores, one whose last line is
    cut and whose losses are NaN; pickles that must not be opened."""
    top = "tune_zoo_mnist_uniform"
    files = {
        f"{top}/experiment_state-2021.json": b"{}",
        f"{top}/dataset.pt": pickle.dumps(Canary(tmp_path / "canary")),
    }
    for k in range(3):
        trial = f"{top}/NN_tune_trainable_ff43b_0000{k}_{k}_seed={k + 1},x=1_2021-07-12_12-44-44"
        config = {
            "model::type": "CNN", "model::nlin": ("tanh", "relu", "gelu")[k], "model::o_dim": 4,
            "model::dropout": 0.1 * (k == 1), "optim::lr": 0.001, "seed": k + 1,
            "dataset::dump": "/home/authors/dataset.pt", "nested": {"a": 1},
        }  # fmt: skip
        files[f"{trial}/params.json"] = json.dumps(config).encode()
        files[f"{trial}/params.pkl"] = pickle.dumps(Canary(tmp_path / "canary"))
        lines = [
            {"training_iteration": e, "test_acc": 0.1 + e / 100, "train_acc": 0.2, "pid": 7,
             "test_loss": float("nan") if k == 2 else 1.5, "sharpness": 0.25, "config": config}
            for e in (1, 0, 50)
        ]  # fmt: skip
        text = "\n".join(json.dumps(line) for line in lines)
        if k != 1:
            files[f"{trial}/result.json"] = text[: -9 if k == 2 else None].encode()
        for e in EPOCHS:
            below = f"{trial}/checkpoint_{e:06d}" if padded else f"{trial}/checkpoint_{e}"
            files[f"{below}/checkpoints"] = saved(cnn_s(100 * k + e, dropout=k == 1))
            files[f"{below}/optimizer"] = pickle.dumps(Canary(tmp_path / "canary"))
            files[f"{below}/.tune_metadata"] = pickle.dumps(Canary(tmp_path / "canary"))
    return files


@pytest.mark.parametrize(("kind", "padded"), [
    ("folder", True), ("folder", False), ("zip", True), ("tar", True), ("tar.gz", True),
])  # fmt: skip
def test_ray_tune_tree_is_read_as_published(tmp_path, monkeypatch, kind, padded):
    monkeypatch.setenv("QEM_CACHE", str(tmp_path / "cache"))
    zoo = Zoo.open(pack(ray_tune(tmp_path, padded), tmp_path, kind))
    assert (zoo.layout, len(zoo), zoo.failures) == ("model_zoos", 9, [])
    assert not (tmp_path / "canary").exists()
    reasons = {item["reason"]: item["files"] for item in zoo.record["left_out"]}
    assert sum(n for r, n in reasons.items() if "never opened" in r) == 3 + 9 + 1
    assert sum(n for r, n in reasons.items() if "optimiser" in r) == 9
    table = zoo.index
    assert table["step"].tolist() == list(EPOCHS) * 3
    assert table["final"].tolist() == [False, False, True] * 3
    first = table.iloc[0]
    assert (first["test_accuracy"], first["train_accuracy"]) == (0.1, 0.2)  # epoch 0, not line 0
    assert (first["config.optim::lr"], first["seed"], first["metrics.sharpness"]) == (
        0.001,
        1,
        0.25,
    )
    assert table["test_accuracy"].isna().tolist() == [False] * 3 + [True] * 3 + [False, False, True]
    assert table["activation"].tolist() == ["tanh"] * 3 + ["relu"] * 3 + ["gelu"] * 3
    assert table.groupby("run")["split"].nunique().max() == 1
    assert "config.nested" not in table
    assert len(zoo.spaces) == 2  # the same layers under other names
    found = {}
    for space, flat, positions in zoo.load():
        assert isinstance(space, Chain)
        assert space.widths == (1, 4, 3, 2, 6, 10)
        assert "sign" not in applicable(space)  # tanh behind a maximum
        for row, i in zip(flat, positions.tolist(), strict=True):
            found[i] = row
    for i in range(9):
        expected = cnn_s(100 * (i // 3) + EPOCHS[i % 3], dropout=i // 3 == 1)
        assert torch.equal(found[i], torch.cat([t.flatten() for t in expected.values()]))


def test_ray_tune_index_is_read_again_from_the_archive(tmp_path):
    files = ray_tune(tmp_path)
    bad = next(n for n in files if n.endswith("checkpoint_000001/checkpoints"))
    files[bad] = files[bad][:300]
    path = pack(files, tmp_path, "zip")
    summary = index(path, out=tmp_path / "out")
    assert (summary["checkpoints"], [f["checkpoint"] for f in summary["failed"]]) == (8, [bad])
    own, again = Zoo.open(path), Zoo.open(tmp_path / "out")
    rows: dict[str, list] = {}
    for zoo in (own, again):
        for _, flat, positions in zoo.load():
            for row, name in zip(flat, zoo.index["checkpoint"].iloc[positions], strict=True):
                rows.setdefault(name, []).append(row)
    assert {len(found) for found in rows.values()} == {2}
    assert all(torch.equal(a, b) for a, b in rows.values())


def test_networks_with_normalisation_are_listed(tmp_path):
    top = "tune_zoo_cifar10_resnet18/NN_tune_trainable_a_0_seed=1_2022"
    state = {"conv1.weight": torch.ones(2, 3, 3, 3), "bn1.running_mean": torch.ones(2),
             "bn1.weight": torch.ones(2), "bn1.num_batches_tracked": torch.tensor(3)}  # fmt: skip
    files = {f"{top}/params.json": b'{"model::type": "Resnet18", "model::nlin": "relu"}',
             f"{top}/checkpoint_000060/checkpoints": saved(state)}  # fmt: skip
    zoo = Zoo.open(pack(files, tmp_path, "folder"))
    (space,) = zoo.spaces.values()
    assert isinstance(space, Opaque)
    assert (space.size, zoo.index["activation"].tolist()) == (58, [None])
    with pytest.raises(InputError, match="normalisation"):
        open_zoo(tmp_path / "tune_zoo_cifar10_resnet18")


def park_config(channels, residual, activation, kernels):
    """The authors' class, as their pickles name it; the reader must not need it."""
    module = types.ModuleType("create_random_cnns")
    kind = dataclasses.make_dataclass(
        "CNNConfig", ["n_layers", "channels", "kernel_size", "stride", "residual", "activation"]
    )
    kind.__module__ = "create_random_cnns"
    module.CNNConfig = kind
    sys.modules["create_random_cnns"] = module
    n = len(channels)
    return kind(n, channels, kernels, [1] * n, residual, activation)


def park_state(seed, channels, kernels=(3, 3, 3)):
    rng = torch.Generator().manual_seed(seed)
    widths = [3, *channels]
    made = OrderedDict()
    for i, (a, b, side) in enumerate(zip(widths, channels, kernels, strict=False)):
        made[f"layers.{i}.weight"] = torch.randn(b, a, side, side, generator=rng)
        made[f"layers.{i}.bias"] = torch.randn(b, generator=rng)
    made["fc.weight"] = torch.randn(10, channels[-1], generator=rng)
    made["fc.bias"] = torch.randn(10, generator=rng)
    return made


NETS = {
    "trial_a": ([4, 6], [-1, -1], ["relu", "relu"], [3, 3]),
    # The first layer is added, to one of another width and to one of the same.
    "trial_b": ([4, 5, 6], [-1, -1, 0], ["relu", "relu", "relu"], [3, 3, 3]),
    "trial_c": ([5, 6, 5], [-1, -1, 0], ["tanh", "gelu", "tanh"], [3, 5, 7]),
}


def park(splits=True):
    files, top = {}, "cifar10_zooV2"
    for k, (trial, (channels, residual, activation, kernels)) in enumerate(NETS.items()):
        for e in (10, 20):
            tree = {
                "model": park_state(10 * k + e, channels, kernels),
                "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
                "config": park_config(channels, residual, activation, kernels),
                "iteration": e,
                "last_result": {"test/acc": 0.3 + k / 10 + e / 1000, "config": {}},
            }
            files[f"{top}/{trial}/checkpoint_{e:06d}/checkpoint.pt"] = saved(tree)
        files[f"{top}/{trial}/params.pkl"] = b"no pickle"
    if splits:
        record = {
            part: {"path": [f"{top}/{trial}/checkpoint_{e:06d}" for e in (10, 20)],
                   "score": [0.7, 0.8], "step": [10, 20]}
            for part, trial in zip(("train", "val", "test"), NETS, strict=True)
        }  # fmt: skip
        files[f"{top}/cnn_park_splits.json"] = json.dumps(record).encode()
    sys.modules.pop("create_random_cnns")
    return files


@pytest.mark.parametrize("kind", ["folder", "zip", "tar.xz"])
@pytest.mark.parametrize("splits", [True, False])
def test_wild_park_is_read_without_its_authors_classes(tmp_path, monkeypatch, kind, splits):
    monkeypatch.setenv("QEM_CACHE", str(tmp_path / "cache"))
    zoo = Zoo.open(pack(park(splits), tmp_path, kind))
    assert (zoo.layout, len(zoo), zoo.failures) == ("wild_park", 6, [])
    assert "create_random_cnns" not in sys.modules
    table = zoo.index
    assert table["config.channels"].tolist()[::2] == ["4 6", "4 5 6", "5 6 5"]
    assert table["activation"].fillna("unknown").tolist()[::2] == ["relu", "unknown", "unknown"]
    if splits:
        assert table["split"].tolist()[::2] == ["train", "val", "test"]
        assert table["test_accuracy"].tolist() == [0.7, 0.8] * 3
    else:
        np.testing.assert_allclose(table["test_accuracy"], [0.31, 0.32, 0.41, 0.42, 0.51, 0.52])
    kinds = {}
    for space, flat, positions in zoo.load():
        for row, i in zip(flat, positions.tolist(), strict=True):
            kinds[i] = space
            channels, _, _, kernels = list(NETS.values())[i // 2]
            expected = park_state(10 * (i // 2) + (10, 20)[i % 2], channels, kernels)
            w = space.unflatten(row[None])
            assert all(torch.equal(w[name][0], expected[name]) for name in expected)
    assert isinstance(kinds[2], Opaque)
    why = "residual connections: layer 0 of 4 neurons cannot be added to layer 2 of 6"
    assert kinds[2].reason == why
    assert isinstance(kinds[4], Residual)
    assert (kinds[4].hidden, kinds[4].activation) == ({"h1": 5, "h2": 6}, None)
    assert applicable(kinds[4]) == ["permutation"]
    assert kinds[0].widths == (3, 4, 6, 10)
    assert (kinds[0].forward.known, kinds[0].forward.padding) == (True, 1)
    assert len(open_zoo(zoo.path).index) == 4


def sampled(w, residual, activation, x):
    """What the authors' own class computes (its published sampler), for sums of equal widths."""
    act = {"relu": torch.relu, "tanh": torch.tanh}
    kept = []
    for i, (added, name) in enumerate(zip(residual, activation, strict=True)):
        weight = w[f"layers.{i}.weight"]
        padding = weight.shape[-1] // 2
        x = torch.conv2d(x, weight, w[f"layers.{i}.bias"], padding=padding)
        if added > -1:
            x = x + kept[added]
        x = act[name](x)
        kept.append(x)
    return x.mean((2, 3)) @ w["fc.weight"].T + w["fc.bias"]


def test_wild_park_network_with_sums_is_run_as_the_authors_do(tmp_path, monkeypatch):
    nets = {"trial_r": ([5, 6, 5, 6], [-1, -1, 0, 1], ["relu"] * 4, [3, 5, 7, 3])}
    monkeypatch.setitem(globals(), "NETS", nets)
    path = pack(park(splits=False), tmp_path, "folder")
    zoo = Zoo.open(path)
    ((space, flat, _),) = zoo.load()
    assert isinstance(space, Residual)
    assert set(applicable(space)) == {"permutation", "scale", "monomial"}
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = space.unflatten(flat.double())
    for i, found in enumerate(respond(space, w, x)):
        one = {name: values[i] for name, values in w.items()}
        wanted = sampled(one, *nets["trial_r"][1:3], x)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-8)
    index(path, out=tmp_path / "index")
    ((again, rows, _),) = Zoo.open(tmp_path / "index").load()
    assert again == space
    assert torch.equal(rows, flat)


@pytest.mark.parametrize(
    ("setting", "said"),
    [({"stride": [2, 1, 1]}, "do not keep their size"), ({"residual": [-1, 0]}, "4 layers")],
)
def test_wild_park_sums_that_are_not_understood_are_listed(tmp_path, setting, said):
    config = {"residual": [-1, -1, 0], "activation": ["relu"] * 3, "stride": [1] * 3, **setting}
    tree = {"model": park_state(0, [4, 5, 4]), "config": config}
    name = "cifar10_zooV2/trial/checkpoint_000010/checkpoint.pt"
    zoo = Zoo.open(pack({name: saved(tree)}, tmp_path, "folder"))
    (space,) = zoo.spaces.values()
    assert isinstance(space, Opaque)
    assert said in space.reason
    tree["config"]["residual"] = ["first"]
    name = name.replace("000010", "000020")
    failed = pack({name: saved(tree)}, tmp_path / "bad", "folder")
    with pytest.raises(InputError, match="not the numbers of layers"):
        Zoo.open(failed)


def test_wild_park_settings_in_omegaconf_are_read_as_data(tmp_path):
    """The bytes were written by OmegaConf 2.4, which is not installed here."""
    from pathlib import Path

    data = (Path(__file__).parent.parent / "data" / "omegaconf.pt").read_bytes()
    name = "cifar10_zooV2/trial/checkpoint_000010/checkpoint.pt"
    zoo = Zoo.open(pack({name: data}, tmp_path, "folder"))
    assert "omegaconf" not in sys.modules
    row = zoo.index.iloc[0]
    assert (row["config.channels"], row["config.residual"], row["activation"]) == (
        "4 8", "-1 -1", "relu"
    )  # fmt: skip
    assert row["test_accuracy"] == 0.5


def test_compressed_archive_is_unpacked_once_and_bombs_are_refused(tmp_path, monkeypatch):
    from qemcli.zoos import unpacking

    monkeypatch.setenv("QEM_CACHE", str(tmp_path / "cache"))
    path = pack(ray_tune(tmp_path), tmp_path, "tar.gz")
    Zoo.open(path)
    kept = list((tmp_path / "cache" / "archives").iterdir())
    assert [file.suffix for file in kept] == [".tar"]
    number = kept[0].stat().st_ino
    Zoo.open(path)
    assert [f.stat().st_ino for f in (tmp_path / "cache" / "archives").iterdir()] == [number]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cut short or damaged"):
        Zoo.open(path)
    path.write_bytes(whole)
    monkeypatch.setattr(unpacking, "MAX_FREE", 1000)
    monkeypatch.setattr(unpacking, "MAX_RATIO", 1)
    os.utime(path, ns=(1, 1))
    with pytest.raises(InputError, match="a bomb"):
        Zoo.open(path)
    assert len(list((tmp_path / "cache" / "archives").iterdir())) == 1
