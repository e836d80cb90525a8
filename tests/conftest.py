"""Fixtures that every test may use: a seeded generator and the command line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads are slow here

import pytest
import torch
from hypothesis import settings

settings.register_profile("dev", max_examples=20, deadline=None)
settings.register_profile("ci", max_examples=40, deadline=None, derandomize=True)
settings.register_profile("deep", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1)


@pytest.fixture
def rng() -> torch.Generator:
    """A generator that starts the same in every test."""
    return torch.Generator().manual_seed(0)


@dataclass
class Ran:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Ran]:
    """`run("predict", "zoo", "--json")`: the command in this process, as a shell would see it."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("QEM_ZOO", raising=False)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Ran:
        from qemcli.cli import main

        monkeypatch.setattr(sys, "argv", ["qem", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        if torch := sys.modules.get("torch"):
            torch.set_flush_denormal(False)  # a command sets it for its process, which here goes on
        code = left.value.code
        return Ran(code if isinstance(code, int) else int(code is not None), out, err)

    return call


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were asked for; none is taken."""
    taken: list[float] = []
    monkeypatch.setattr("time.sleep", taken.append)
    return taken


@pytest.fixture
def web(waits: list[float]) -> Iterator[Any]:
    """A web server with faults (fake_web.py)."""
    from fake_web import Web

    with Web().running() as server:
        yield server


@pytest.fixture
def hub(waits: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A Hub with faults (fake_hub.py), which the real client talks to, and an empty cache."""
    from fake_hub import FakeHub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    server = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with server.running():
        yield server
