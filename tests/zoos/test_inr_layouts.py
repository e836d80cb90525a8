"""The published INR zoos, byte for byte: the exact trees, as a folder and as the archive itself."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from qemcli.errors import InputError, QemError
from qemcli.zoos import members
from qemcli.zoos.indexing import index
from qemcli.zoos.zoo import Zoo

NFN = ("net.0.linear", "net.1.linear", "net.2")
DWS = ("seq.0", "seq.1", "seq.2")


def state(seed, names=NFN, widths=(2, 6, 5, 1)):
    """A SIREN's state dict, weight before bias."""
    rng = torch.Generator().manual_seed(seed)
    made = OrderedDict()
    for name, cols, rows in zip(names, widths, widths[1:], strict=False):
        made[f"{name}.weight"] = torch.randn(rows, cols, generator=rng)
        made[f"{name}.bias"] = torch.randn(rows, generator=rng)
    return made


def saved(tree):
    out = io.BytesIO()
    torch.save(tree, out)
    return out.getvalue()


def pack(files, root, kind):
    """The files as a folder, a tar or a zip; returns what a user would name."""
    if kind == "folder":
        for name, data in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        return root / next(iter(files)).split("/")[0]
    if kind == "tar":
        path = root / "zoo.tar"
        with tarfile.open(path, "w") as archive:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return path
    path = root / "zoo.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def nfn(images=((0, 7), (1, 3), (44_999, 0), (45_000, 9), (50_000, 2), (69_999, 7)), outputs=1):
    """{path: bytes} of a SIREN zoo of NFN; network `image` is drawn from the seed `image`."""
    sets = {1: "mnist", 3: "cifar"}
    top = f"siren_{sets[outputs]}_wts"
    return {
        f"{top}/randinit_smaller_{label}s/net{image}.pth": saved(
            state(image, widths=(2, 6, 5, outputs))
        )
        for image, label in images
    }


def weights(zoo):
    """checkpoint -> flat weights, of everything that can be read."""
    found = {}
    for _, flat, positions in zoo.load():
        names = zoo.index["checkpoint"].iloc[positions]
        found |= dict(zip(names, flat, strict=True))
    return found


def flat(tree):
    return torch.cat([t.flatten() for t in tree.values() if isinstance(t, torch.Tensor)])


KINDS = ("folder", "tar", "zip")


@pytest.mark.parametrize("kind", KINDS)
def test_nfn_zoo_is_read_byte_for_byte(tmp_path, kind):
    zoo = Zoo.open(pack(nfn(), tmp_path, kind))
    assert zoo.layout == "nfn_siren"
    rows = zoo.index.set_index("image")
    assert rows["label"].to_dict() == {0: 7, 1: 3, 44_999: 0, 45_000: 9, 50_000: 2, 69_999: 7}
    assert rows["split"].loc[[0, 44_999]].eq("train").all()
    assert rows["split"].loc[[45_000, 50_000, 69_999]].tolist() == ["val", "test", "test"]
    assert str(zoo.index["label"].dtype) == "int64"
    (space,) = zoo.spaces.values()
    assert (space.family, space.activation, space.forward.w0) == ("siren", "sin", 30.0)
    assert (space.forward.axes, space.forward.levels) == ("ij", (-1.0, 1.0))
    assert (space.forward.image, space.forward.known) == ((1, 28, 28), True)
    assert space.names == tuple(f"{n}.{t}" for n in NFN for t in ("weight", "bias"))
    found = weights(zoo)
    for image, name in zip(zoo.index["image"], zoo.index["checkpoint"], strict=True):
        assert torch.equal(found[name], flat(state(image)))
    assert zoo.failures == []


def test_three_outputs_are_cifar_images(tmp_path):
    (space,) = Zoo.open(pack(nfn(outputs=3), tmp_path, "tar")).spaces.values()
    assert space.forward.image == (3, 32, 32)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_augmented_copies_come_only_when_asked_for(tmp_path, kind):
    files = nfn()
    for copy, image in ((0, 0), (0, 50_000), (12, 1)):
        name = f"siren_mnist_wts/randinit_smaller_aug{copy}_7s/net{image}.pth"
        files[name] = saved(state(1000 + copy + image))
    zoo = Zoo.open(pack(files, tmp_path, kind))
    assert len(zoo) == 6
    assert zoo.index["augmented"].eq(-1).all()
    (left_out,) = zoo.record["left_out"]
    assert left_out["files"] == 3
    assert "augmented" in left_out["reason"]
    asked = zoo.where("augmented < 5")
    assert sorted(asked.index["augmented"]) == [-1] * 6 + [0, 0]
    copies = asked.index[asked.index["augmented"] == 0].set_index("image")
    assert copies["split"].loc[0] == "train"
    assert copies["split"].isna().loc[50_000]  # a copy of a test image belongs nowhere
    found = next(w for n, w in weights(asked).items() if n.endswith("aug0_7s/net0.pth"))
    assert torch.equal(found, flat(state(1000)))
    assert len(zoo.where("image >= 0")) == 6


def test_image_in_two_classes_is_named(tmp_path):
    files = {**nfn(), "siren_mnist_wts/randinit_smaller_4s/net1.pth": saved(state(5))}
    zoo = Zoo.open(pack(files, tmp_path, "zip"))
    assert len(zoo) == 5
    assert [f["reason"] for f in zoo.failures] == ["its image stands in two classes"] * 2


def dws_mnist():
    files = {
        f"mnist-inrs/mnist_png_{part}_{label}_{i}/checkpoints/model_final.pth": saved(
            state(i + (part == "testing"), DWS)
        )
        for part, label, i in (("training", 2, 23_089), ("training", 0, 4), ("testing", 9, 17))
    }
    noise = {
        "mnist-inrs/cifar10_png_train_cat_5/checkpoints/model_final.pth": saved(
            state(8, DWS, (2, 6, 5, 3))
        ),
        "mnist-inrs/statistics.pth": saved({"weights": {"mean": [torch.zeros(2)]}}),
        "__MACOSX/mnist-inrs/._statistics.pth": b"\0\5\x16\7",
    }
    return {**files, **noise}


@pytest.mark.parametrize("kind", KINDS)
def test_dws_mnist_is_read_and_its_noise_is_named(tmp_path, kind):
    zoo = Zoo.open(pack(dws_mnist(), tmp_path, kind))
    assert (zoo.layout, len(zoo)) == ("dws_inr", 3)
    rows = zoo.index.set_index("image")
    assert rows["label"].to_dict() == {23_089: 2, 4: 0, 60_017: 9}
    assert rows["split"].loc[60_017] == "test"
    assert set(rows["split"].loc[[4, 23_089]]) <= {"train", "val"}
    (space,) = zoo.spaces.values()
    assert (space.forward.axes, space.forward.offset) == ("xy", 0.5)
    assert space.forward.image == (1, 28, 28)
    found = weights(zoo)
    name = "mnist_png_testing_9_17/checkpoints/model_final.pth"
    assert torch.equal(next(w for n, w in found.items() if n.endswith(name)), flat(state(18, DWS)))
    reasons = " ".join(item["reason"] for item in zoo.record["left_out"])
    assert "networks of other images than mnist" in reasons
    assert "statistics of the zoo" in reasons
    assert ("macOS" in reasons) == (kind != "folder")  # a folder is named from within
    assert zoo.failures == []


def fmnist(labels=(3, 3, 9, 0)):
    places = (("train", 0), ("train", 7), ("train", 8), ("test", 0))
    files = {
        f"fmnist_inrs/{part}/model_{i}.pth": saved(
            {**state(i + 50 * (part == "test"), DWS), "label": label}
        )
        for (part, i), label in zip(places, labels, strict=True)
    }
    home = "/home/authors/data/fmnist_inrs"
    splits = {
        "train": [f"{home}/train/model_0.pth", f"{home}/train/model_8.pth"],
        "val": [f"{home}/train/model_7.pth"],
        "test": [f"{home}/test/model_0.pth"],
    }
    return {**files, "fmnist_inrs/splits.json": json.dumps(splits).encode()}


@pytest.mark.parametrize("kind", KINDS)
def test_dws_fmnist_has_its_labels_inside_and_its_own_splits(tmp_path, kind):
    zoo = Zoo.open(pack(fmnist(), tmp_path, kind))
    rows = zoo.index.set_index("image")
    assert rows["label"].to_dict() == {0: 3, 7: 3, 8: 9, 60_000: 0}
    assert rows["split"].to_dict() == {0: "train", 7: "val", 8: "train", 60_000: "test"}
    (space,) = zoo.spaces.values()
    assert space.names[0] == "seq.0.weight"
    assert space.skipped == ()
    found = weights(zoo)
    assert torch.equal(next(w for n, w in found.items() if "test/" in n), flat(state(50, DWS)))


def test_splits_with_labels_beside_the_archive_are_used(tmp_path):
    path = pack(dws_mnist(), tmp_path, "zip")
    at = "some/where/mnist-inrs/mnist_png_training_{}/checkpoints/model_final.pth"
    splits = {
        "train": {"path": [at.format("2_23089")], "label": ["2"]},
        "val": {"path": [at.format("0_4")], "label": ["0"]},
        "test": {"path": [], "label": []},
    }
    (tmp_path / "mnist_splits.json").write_text(json.dumps(splits))
    rows = Zoo.open(path).index.set_index("image")
    assert (rows["split"].loc[23_089], rows["split"].loc[4]) == ("train", "val")
    assert rows["split"].isna().loc[60_017]
    (tmp_path / "mnist_splits.json").write_text('{"train": 3}')
    with pytest.raises(InputError, match="not a splits file"):
        Zoo.open(path)


def test_sine_inrs_leave_out_the_data_they_carry(tmp_path):
    wave = {"coef": [0.5, 2.0], "x": torch.linspace(-1, 1, 40), "y": torch.zeros(40)}
    files = {
        f"ssl-inrs/model_{i}.pth": saved({**state(i, DWS, (1, 6, 5, 1)), **wave}) for i in range(3)
    }
    zoo = Zoo.open(pack(files, tmp_path, "zip"))
    (space,) = zoo.spaces.values()
    assert space.widths == (1, 6, 5, 1)
    assert space.forward.image is None
    (found,) = [flat for _, flat, _ in zoo.load()]
    assert torch.equal(found[1], flat(state(1, DWS, (1, 6, 5, 1))))


class Canary:
    """A pickle that would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_members_are_counted_and_the_rest_is_read(tmp_path, kind):
    canary = tmp_path / "canary"
    files = nfn()
    damaged = bytearray(saved(state(1)))
    damaged[damaged.index(state(1)["net.1.linear.weight"].numpy().tobytes()) + 5] ^= 1
    bad = {
        "2": saved({"net.0.linear.weight": Canary(canary)}),
        "3": b"<!DOCTYPE html><html>Dropbox</html>",
        "4": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "5": saved(state(5))[:-40],
        "6": bytes(damaged),
        "8": saved(state(3, widths=(2, 4, 1))),
        "9": b"",
    }
    top = "siren_mnist_wts/randinit_smaller_1s"
    path = pack({**files, **{f"{top}/net{k}.pth": v for k, v in bad.items()}}, tmp_path, kind)
    zoo = Zoo.open(path)
    found = weights(zoo)
    failed = {f["checkpoint"].rpartition("/net")[2]: f["reason"] for f in zoo.failures}
    assert not canary.exists()
    assert len(found) == len(files)
    assert set(failed) == {f"{k}.pth" for k in bad}
    wants = {
        "2": "Python objects", "3": "web page", "4": "git-lfs pointer", "5": "cut short",
        "6": "checksum", "8": "not those of the zoo", "9": "empty",
    }  # fmt: skip
    for key, said in wants.items():
        assert said in failed[f"{key}.pth"]
        assert "\n" not in failed[f"{key}.pth"]
        assert "/tmp" not in failed[f"{key}.pth"]


def test_hostile_names_links_and_sizes_are_refused_by_name(tmp_path):
    path = pack(nfn(), tmp_path, "tar")
    inner = "randinit_smaller_0s/net77.pth"
    with tarfile.open(path, "a") as archive:
        for name in (f"../{inner}", f"/etc/{inner}", f"a/../../{inner}"):
            archive.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo(inner)
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        huge = tarfile.TarInfo(f"big/{inner}")
        huge.size = members.LARGEST + 1
        archive.addfile(huge, io.BytesIO(bytes(huge.size)))
    zoo = Zoo.open(path)
    reasons = [f["reason"] for f in zoo.failures]
    assert len(zoo) == 6
    assert sum("points out" in r for r in reasons) == 3
    assert sum("link" in r for r in reasons) == 1
    assert sum("too large" in r for r in reasons) == 1


def test_zip_bomb_is_never_unpacked(tmp_path):
    path = tmp_path / "zoo.zip"
    liar = "siren_mnist_wts/randinit_smaller_0s/net1.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in nfn(((0, 7), (2, 3))).items():
            archive.writestr(name, data)
        archive.writestr(liar, bytes(members.LARGEST))
        archive.writestr("randinit_smaller_0s/net5.pth", bytes(members.LARGEST + 1))
    # A directory that claims 100 bytes for what unpacks to 16 MiB.
    data = path.read_bytes()
    size = struct.pack("<I", members.LARGEST)
    at = data.rindex(liar.encode()) - 46
    assert data[at + 24 : at + 28] == size
    path.write_bytes(data[: at + 24] + struct.pack("<I", 100) + data[at + 28 :])
    zoo = Zoo.open(path)
    assert len(weights(zoo)) == 2
    reasons = {f["checkpoint"]: f["reason"] for f in zoo.failures}
    assert "checksum" in reasons[liar]
    assert "too large" in reasons["randinit_smaller_0s/net5.pth"]


def test_tar_that_is_cut_short_is_read_up_to_the_cut(tmp_path):
    path = pack(nfn(), tmp_path, "tar")
    whole = Zoo.open(path)
    last = whole.index.sort_values("offset").iloc[-1]
    with path.open("r+b") as file:
        file.truncate(int(last["offset"]) + 700)
    zoo = Zoo.open(path)
    assert len(weights(zoo)) == 5
    assert [f["checkpoint"] for f in zoo.failures] == [last["checkpoint"]]
    assert "cut short" in zoo.failures[0]["reason"]
    summary = index(path, out=tmp_path / "out")
    assert (summary["checkpoints"], len(summary["failed"])) == (5, 1)


def test_archive_that_is_none_says_what_it_is(tmp_path):
    path = pack(dws_mnist(), tmp_path, "zip")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="cut short or damaged"):
        Zoo.open(path)
    for data, said in (
        (b"<!DOCTYPE html><html>dl=0</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git-lfs pointer"),
        (b"\x1f\x8b" + bytes(600), "gzip"),
    ):
        path.write_bytes(data)
        with pytest.raises(QemError, match=said):
            Zoo.open(path)
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("readme.txt"))
    with pytest.raises(InputError, match="tar archive that holds no zoo"):
        Zoo.open(tmp_path / "other.tar")


@pytest.mark.parametrize("kind", KINDS)
def test_index_of_an_archive_reads_it_again_without_listing_it(tmp_path, kind, monkeypatch):
    path = pack(fmnist(), tmp_path, kind)
    want = weights(Zoo.open(path))
    summary = index(path, out=tmp_path / "out")
    assert (summary["checkpoints"], summary["finite"], summary["labelled"]) == (4, 4, 4)
    monkeypatch.setattr(members.Tar, "members", None)
    monkeypatch.setattr(members.Zip, "members", None)
    zoo = Zoo.open(tmp_path / "out")
    found = weights(zoo)
    assert set(found) == set(want)
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert zoo.index["label"].tolist() == [0, 3, 3, 9]
    (space,) = zoo.spaces.values()
    assert (space.forward.axes, space.forward.image) == ("xy", (1, 28, 28))
    index(tmp_path / "out", out=tmp_path / "again")  # an index of an index means the same archive
    assert torch.equal(torch.stack(list(weights(Zoo.open(tmp_path / "again")).values())),
                       torch.stack(list(found.values())))  # fmt: skip


def test_archive_that_changed_after_indexing_is_named(tmp_path):
    path = pack(nfn(), tmp_path, "zip")
    index(path, out=tmp_path / "out")
    data = path.read_bytes()
    path.write_bytes(data[:50] + bytes(200) + data[250:])
    zoo = Zoo.open(tmp_path / "out")
    assert len(weights(zoo)) == 5
    assert len(zoo.failures) == 1


def test_fast_reading_equals_torch_for_odd_files(tmp_path):
    from qemcli.formats._alike import Alike

    base = state(3)
    turned = OrderedDict(base)
    turned["net.1.linear.weight"] = torch.randn(6, 5).T  # stored column by column
    tied = OrderedDict(base)
    shared = torch.randn(40)
    tied["net.0.linear.bias"], tied["net.1.linear.bias"] = shared[3:9], shared[8:13]
    wide = OrderedDict((n, t.double()) for n, t in base.items())
    half = OrderedDict((n, t.half()) for n, t in base.items())
    reader = Alike()
    for tree in (base, turned, tied, wide, half, {"state_dict": base, "epoch": 3}):
        for shift in (0.0, 1.0):  # the second file of each kind takes the short way
            inner = tree.get("state_dict", tree)
            for tensor in inner.values():
                tensor += shift
            kind, row = reader.read(saved(tree))
            want = torch.cat([inner[n].float().flatten() for n in kind.space.names])
            assert np.array_equal(row, want.numpy())
    assert sum(kind.order is not None for kind in reader.met.values()) >= 3


def as_published(tree, names, convention, side):
    """The image as the authors' own code makes it: their coordinates, their levels."""
    line = np.linspace(-1, 1, side, dtype=np.float32)
    if convention == "dws":
        grid = np.stack(np.meshgrid(line, line), axis=-1)  # numpy's default: column first
    else:
        first, second = torch.meshgrid(*[torch.from_numpy(line)] * 2, indexing="ij")
        grid = torch.stack([first, second], dim=-1).numpy()
    h = torch.from_numpy(grid.reshape(-1, 2))
    for name in names[:-1]:
        h = torch.sin(30 * (h @ tree[f"{name}.weight"].T + tree[f"{name}.bias"]))
    h = h @ tree[f"{names[-1]}.weight"].T + tree[f"{names[-1]}.bias"]
    image = h.reshape(side, side, -1).permute(2, 0, 1)
    return image + 0.5 if convention == "dws" else image * 0.5 + 0.5


@pytest.mark.parametrize(("names", "convention"), [(NFN, "nfn"), (DWS, "dws")])
def test_what_is_read_shows_the_published_image(tmp_path, names, convention):
    from qemcli.signals import render

    tree = OrderedDict((n, t / 8) for n, t in state(4, names).items())
    name = {
        "nfn": "siren_mnist_wts/randinit_smaller_7s/net4.pth",
        "dws": "mnist-inrs/mnist_png_training_7_4/checkpoints/model_final.pth",
    }[convention]
    zoo = Zoo.open(pack({name: saved(tree)}, tmp_path, "zip"))
    ((space, flat, _),) = zoo.load()
    image = render(space, space.unflatten(flat))[0]
    assert image.shape == (1, 28, 28)
    assert torch.allclose(image, as_published(tree, names, convention, 28), atol=1e-4)
    other = as_published(tree, names, "dws" if convention == "nfn" else "nfn", 28)
    assert not torch.allclose(image, other, atol=0.05)
