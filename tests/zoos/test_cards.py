"""The cards of published zoos: each says where it is had, under what licence, whom to cite, how it
is split and how it is read."""

from __future__ import annotations

import pytest

from qemcli.shipped import shipped
from qemcli.zoos.known import front_matter
from qemcli.zoos.published import published

CARDS = sorted(
    folder.name
    for folder in shipped("zoos").glob("*")
    if "Not shipped" in (text := (folder / "README.md").read_text() if folder.is_dir()
                         and (folder / "README.md").is_file() else "")
    or "It is not shipped" in text
)  # fmt: skip


def test_every_published_zoo_has_a_card():
    assert len(CARDS) >= 18
    assert set(published()) <= set(CARDS)


@pytest.mark.parametrize("name", CARDS)
def test_card_is_complete(name):
    folder = shipped("zoos") / name
    head, text = front_matter(folder), (folder / "README.md").read_text()
    assert {"license", "licence", "family", "tags"} <= set(head)
    assert "arXiv:" in text
    assert "Read by `qem index" in text
    assert "split" in text.lower()
    assert "checksum" in text or "md5" in text or "sha256" in text or "Not shipped." in text
    assert name in published() or "browser only" in text
    assert max(map(len, text.splitlines())) <= 140
