"""Copies along the orbit: the same functions, the same labels, resumable; refused where it is no
symmetry."""

from __future__ import annotations

from pathlib import Path

import pandas
import pytest
import torch
from zoo_kit import write_zoo

from qemcli import orbits
from qemcli.functions import probe_inputs, respond
from qemcli.spaces import Forward, cnn, siren
from qemcli.zoos.zoo import Zoo

SPACE = cnn(
    [1, 5, 7, 4],
    3,
    positions=4,
    forward=Forward(stride=2, padding=1, junction="flatten", image=(1, 16, 16), known=True),
)


def _zoo(tmp_path: Path, space=SPACE, count: int = 7) -> Path:
    flat = 0.3 * torch.randn(count, space.size, generator=torch.Generator().manual_seed(0))
    return write_zoo(tmp_path / "zoo", space, flat)


def test_copies_compute_the_same_functions(run, tmp_path: Path) -> None:
    zoo = _zoo(tmp_path)
    call = ["augment", zoo, "--factor", 2, "--scale-range", "1:10000", "--out", tmp_path / "out"]
    ran = run(*call, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["function_error_max"] < 1e-5
    assert ran.json["rows"][0]["function_error_float64_max"] < 1e-12
    assert ran.json["rows"][0]["networks"] == 14
    copies = Zoo.open(tmp_path / "out")
    ((space, flat, positions),) = copies.load()
    source = Zoo.open(zoo)
    ((_, originals, at),) = source.load()
    names = source.index["checkpoint"].iloc[at].tolist()
    order = [names.index(n) for n in copies.index["source"].iloc[positions]]
    x = probe_inputs(space, 5, torch.Generator().manual_seed(1), torch.float64)
    before = respond(space, space.unflatten(originals.double()), x)[order]
    after = respond(space, space.unflatten(flat.double()), x)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert (flat - originals[order]).abs().amax(1).min() > 0.1
    labels = copies.index["test_accuracy"].iloc[positions].to_numpy()
    assert (labels == source.index["test_accuracy"].iloc[at].to_numpy()[order]).all()


def test_same_seed_same_bytes_and_another_seed_others(run, tmp_path: Path) -> None:
    zoo = _zoo(tmp_path)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("augment", zoo, "--out", tmp_path / name, "--seed", seed, "-q")
    hashes = {
        n: pandas.read_parquet(tmp_path / n / "index.parquet")["sha256"].tolist() for n in "abc"
    }
    assert hashes["a"] == hashes["b"]
    assert not set(hashes["a"]) & set(hashes["c"])


def test_interrupted_augmentation_goes_on(tmp_path: Path, monkeypatch) -> None:
    zoo = Zoo.open(_zoo(tmp_path))
    monkeypatch.setattr(orbits, "CHUNK", 3)
    plan = orbits.Augment()
    orbits.rewrite(zoo, plan, tmp_path / "whole")

    class Killed(Exception):
        pass

    left = iter([None, Killed()])

    def kill(n: int) -> None:
        if error := next(left):
            raise error

    with pytest.raises(Killed):
        orbits.rewrite(zoo, plan, tmp_path / "cut", advance=kill)
    assert not (tmp_path / "cut" / "index.parquet").exists()
    orbits.rewrite(zoo, plan, tmp_path / "cut", resume=True)
    tables = [pandas.read_parquet(tmp_path / n / "index.parquet") for n in ("whole", "cut")]
    pandas.testing.assert_frame_equal(*tables)


@pytest.mark.parametrize(
    ("space", "group"),
    [(SPACE, "sign"), (SPACE.running("tanh"), "scale"), (SPACE.running("gelu"), "monomial")],
)
def test_group_that_is_no_symmetry_is_refused(space, group, run, tmp_path: Path) -> None:
    ran = run("augment", _zoo(tmp_path, space), "--group", group, "--out", tmp_path / "out")
    assert ran.code == 3
    assert f"group '{group}'" in ran.err
    assert not (tmp_path / "out").exists()


def test_siren_is_moved_by_its_phase(run, tmp_path: Path) -> None:
    zoo = _zoo(tmp_path, siren([2, 6, 5, 1]))
    ran = run("augment", zoo, "--group", "phase", "--out", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["rows"][0]["function_error_float64_max"] < 1e-11


def test_dry_run_writes_nothing(run, tmp_path: Path) -> None:
    ran = run("augment", _zoo(tmp_path), "--out", tmp_path / "out", "--dry-run", "--json")
    assert ran.json["copies"] == 7
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scales", ["1", "a:b", "0:3", "5:2"])
def test_scale_range_is_checked(scales: str, run, tmp_path: Path) -> None:
    ran = run("augment", _zoo(tmp_path), "--scale-range", scales, "--out", tmp_path / "out")
    assert ran.code == 2


def test_canonical_zoo_is_constant_on_orbits(run, tmp_path: Path) -> None:
    zoo = _zoo(tmp_path)
    run("augment", zoo, "--scale-range", "1:100", "--out", tmp_path / "moved", "-q")
    for name, source in (("a", zoo), ("b", tmp_path / "moved")):
        ran = run("canonicalize", source, "--out", tmp_path / name, "--json")
        assert ran.code == 0, ran.err
        assert ran.json["function_error_max"] < 1e-5
    flats = []
    for name in "ab":
        canonical = Zoo.open(tmp_path / name)
        assert (canonical.index["canonical.ties"] == 0).all()
        ((_, flat, _),) = canonical.load()
        flats.append(flat)
    torch.testing.assert_close(flats[0], flats[1], rtol=1e-3, atol=1e-4)


def test_another_plan_does_not_go_on_with_the_first(run, tmp_path: Path) -> None:
    zoo = _zoo(tmp_path)
    call = ["augment", zoo, "--out", tmp_path / "out"]
    assert run(*call, "-q").code == 0
    before = (tmp_path / "out" / "index.parquet").read_bytes()
    other = run(*call, "--seed", 5, "--resume")
    assert other.code == 2
    assert "another recipe or seed" in other.err
    assert run(*call, "--resume", "-q").code == 0
    assert (tmp_path / "out" / "index.parquet").read_bytes() == before
