"""Peak memory of a piece of work: what it took, and not what was there before it."""

import sys

import pytest
import torch

from qemcli import memory
from qemcli.machine import steady


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark")
def test_peak_is_what_the_work_took_and_not_what_was_before() -> None:
    megabyte = 1 << 18  # float32
    held = torch.ones(64 * megabyte)
    with memory.watched() as first:
        torch.ones(100 * megabyte).sum()  # freed at once: the peak remains
    with memory.watched() as second:
        torch.ones(20 * megabyte).sum()
    assert first.megabytes == pytest.approx(100, abs=20)
    assert second.megabytes == pytest.approx(20, abs=15)
    assert held.sum() == 64 * megabyte


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark")
def test_peak_sees_through_memory_that_the_allocator_keeps() -> None:
    steady()  # from here on glibc keeps what is freed
    torch.ones(100 << 18).sum()
    with memory.watched() as peak:
        torch.ones(100 << 18).sum()
    assert peak.megabytes == pytest.approx(100, abs=20)


def test_systems_that_do_not_say_have_no_peak(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "SELF", tmp_path / "none")
    with memory.watched() as peak:
        pass
    assert peak.megabytes is None
