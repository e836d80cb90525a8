"""Keras files, old and new, written byte by byte as Keras lays them out: kernels input first."""

from __future__ import annotations

import json
import sys
import zipfile

import h5py
import numpy as np
import pytest

from qemcli.checkpoints import open_checkpoint
from qemcli.errors import EnvironmentFailure, InputError, UnsupportedError
from qemcli.formats import keras_h5
from qemcli.zoos.indexing import index

RNG = np.random.default_rng(0)
CNN = {  # (h, w, in, out), (in, out)
    "conv2d": (RNG.normal(size=(3, 5, 2, 4)), RNG.normal(size=4)),
    "conv2d_1": (RNG.normal(size=(3, 3, 4, 6)), RNG.normal(size=6)),
    "dense": (RNG.normal(size=(6, 7)), RNG.normal(size=7)),
}
MLP = {
    "dense_9": (RNG.normal(size=(3, 5)), RNG.normal(size=5)),
    "dense_10": (RNG.normal(size=(5, 2)), RNG.normal(size=2)),
}


def config(layers, activation):
    listed = [
        {"class_name": "Dense", "config": {"name": name, "activation": act}}
        for name, act in zip(layers, [activation] * (len(layers) - 1) + ["softmax"], strict=True)
    ]
    return json.dumps({"class_name": "Sequential", "config": {"layers": listed}})


def write_old(path, layers, activation="relu", optimiser=False):
    """Keras 2: model_weights/<layer>/<layer>/kernel:0, with attributes that say the order."""
    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights")
        root.attrs["layer_names"] = [n.encode() for n in (*layers, "dropout")]
        root.create_group("dropout").attrs["weight_names"] = np.array([], dtype="S1")
        for name, (kernel, bias) in layers.items():
            group = root.create_group(name)
            group.attrs["weight_names"] = [f"{name}/kernel:0".encode(), f"{name}/bias:0".encode()]
            group.create_dataset(f"{name}/kernel:0", data=kernel.astype("f4"))
            group.create_dataset(f"{name}/bias:0", data=bias.astype("f4"))
        file.attrs["model_config"] = config(layers, activation)
        if optimiser:
            file.create_dataset("optimizer_weights/Adam/m/kernel:0", data=np.ones((3, 5), "f4"))
    return path


def write_new(path, layers, dtype="f4"):
    """Keras 3: layers/<layer>/vars/0 and 1."""
    with h5py.File(path, "w") as file:
        for name, (kernel, bias) in layers.items():
            file.create_dataset(f"layers/{name}/vars/0", data=kernel.astype(dtype))
            file.create_dataset(f"layers/{name}/vars/1", data=bias.astype(dtype))
        file.create_dataset("optimizer/vars/0", data=np.ones(3, "f4"))
    return path


def assert_holds(found, layers):
    space = found.space()
    arrays = found.tensors(space.names)
    pairs = zip(space.names[::2], space.names[1::2], strict=True)
    for (weight, bias), (kernel, shift) in zip(pairs, layers.values(), strict=True):
        for place in (
            (0,) * kernel.ndim,
            tuple(n - 1 for n in kernel.shape),
            tuple(n // 2 for n in kernel.shape),
        ):
            here = (place[3], place[2], place[0], place[1]) if len(place) == 4 else place[::-1]
            assert np.float32(arrays[weight][here]) == np.float32(kernel[place])
        np.testing.assert_array_equal(arrays[bias].astype("f4"), shift.astype("f4"))
    return space


@pytest.mark.parametrize("layers", [CNN, MLP])
def test_old_file_lands_in_torchs_layout(tmp_path, layers):
    found = open_checkpoint(write_old(tmp_path / "a.h5", layers, optimiser=True))
    space = assert_holds(found, layers)
    assert (found.format, space.activation) == ("keras_h5", "relu")
    skipped = dict(found.skipped)
    assert skipped == {"optimizer_weights/Adam/m/kernel:0": keras_h5.OPTIMISER}
    assert found.coverage(space) == 1.0


@pytest.mark.parametrize("layers", [CNN, MLP])
@pytest.mark.parametrize("dtype", ["f4", "f2", "f8"])
def test_new_file_is_told_by_its_layers(tmp_path, layers, dtype):
    path = write_new(tmp_path / "a.weights.h5", layers, dtype)
    stored = {n: tuple(x.astype(dtype) for x in pair) for n, pair in layers.items()}
    space = assert_holds(open_checkpoint(path), stored)
    assert space.activation is None


def test_keras_file_is_a_zip_of_both(tmp_path):
    write_new(tmp_path / "w.h5", MLP)
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = tmp_path / "a.keras"
        with zipfile.ZipFile(path, "w", kind) as archive:
            archive.writestr("metadata.json", "{}")
            archive.writestr("config.json", config(MLP, "tanh"))
            archive.write(tmp_path / "w.h5", "model.weights.h5")
        space = assert_holds(open_checkpoint(path), MLP)
        assert space.activation == "tanh"


def test_two_activations_or_pooled_tanh_claim_nothing(tmp_path):
    record = json.loads(config(MLP | {"dense_11": MLP["dense_10"]}, "relu"))
    record["config"]["layers"][1]["config"]["activation"] = "tanh"
    assert keras_h5._activation(json.dumps(record)) == {}
    pooled = json.loads(config(MLP, "tanh"))
    assert keras_h5._activation(json.dumps(pooled)) == {"activation": "tanh"}
    pooled["config"]["layers"][0]["class_name"] = "MaxPooling2D"
    assert keras_h5._activation(json.dumps(pooled)) == {}


def test_batch_normalisation_is_refused_and_listed(tmp_path):
    path = write_new(tmp_path / "a.weights.h5", MLP)
    with h5py.File(path, "a") as file:
        for n in range(4):
            file.create_dataset(f"layers/batch_normalization/vars/{n}", data=np.ones(5, "f4"))
    with pytest.raises(UnsupportedError, match="normalisation"):
        open_checkpoint(path).space()
    summary = index(tmp_path, out=tmp_path / "out")
    assert (summary["checkpoints"], len(summary["only_listed"])) == (1, 1)


def test_nothing_is_followed_out_of_the_file(tmp_path):
    write_new(tmp_path / "secret.h5", MLP)
    for name, link in (
        ("external", h5py.ExternalLink("secret.h5", "layers")),
        ("soft", h5py.SoftLink("/layers")),
    ):
        path = write_new(tmp_path / f"{name}.h5", MLP)
        with h5py.File(path, "a") as file:
            file["more"] = link
        with pytest.raises(InputError, match="link, which is not followed"):
            open_checkpoint(path)
    with h5py.File(tmp_path / "stored.h5", "w") as file:
        outside = [(str(tmp_path / "secret.h5"), 0, 64)]
        file.create_dataset("kernel", (4, 4), "f4", external=outside)
    with pytest.raises(InputError, match="no tensor of this file"):
        open_checkpoint(tmp_path / "stored.h5")


def test_bomb_is_refused_before_it_unpacks(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("kernel", data=np.zeros((900, 900), "f4"), compression="gzip")
    assert open_checkpoint(tmp_path / "a.h5").shapes == {"kernel": (900, 900)}
    monkeypatch.setattr(keras_h5, "MAX_FREE", 1 << 20)
    with pytest.raises(InputError, match="unpacks to"):
        open_checkpoint(tmp_path / "a.h5")


def test_cut_file_is_one_clear_error(tmp_path):
    whole = write_old(tmp_path / "a.h5", MLP).read_bytes()
    file = tmp_path / "cut.h5"
    for count in range(8, len(whole) - 1, 211):
        file.write_bytes(whole[:count])
        with pytest.raises(InputError) as caught:
            open_checkpoint(file).tensors()
        assert "\n" not in caught.value.message


def test_without_h5py_the_extra_is_named(tmp_path, monkeypatch):
    path = write_old(tmp_path / "a.h5", MLP)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(EnvironmentFailure) as caught:
        open_checkpoint(path)
    assert caught.value.hint == 'pip install "qemcli[keras]"'
