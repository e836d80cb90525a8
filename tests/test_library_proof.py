"""Real code agrees: checkpoints of the transformers library, moved, saved and loaded again by
`from_pretrained`, answer the same; moves that are no symmetry do not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers_kit as kit

from qemcli import groups
from qemcli.controls import controls
from qemcli.directories import Directory, augment
from qemcli.errors import InputError, UnsupportedError
from qemcli.library import Library, answers
from qemcli.proof import Probe, rounding
from qemcli.testing import relative_error

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4}
HOLDS = {
    "gpt2": {"general-linear", "heads", "permutation", "shift", "stream"},
    "bert": {"general-linear", "heads", "permutation", "shift", "stream"},
    "vit": {"general-linear", "heads", "permutation", "shift", "stream", "orthogonal"},
    "llama": {
        "general-linear", "heads", "permutation", "scale", "sign", "monomial", "stream",
        "orthogonal",
    },
    "qwen2": {
        "general-linear", "heads", "permutation", "scale", "sign", "monomial", "stream",
        "orthogonal",
    },
    "gpt_neox": {"general-linear", "heads", "permutation", "shift", "stream", "orthogonal"},
}  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loaded(folder: Path, dtype: torch.dtype, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What `from_pretrained` makes of a folder answers."""
    return answers(Library.of(folder).model(dtype), inputs)


def apart(before: torch.Tensor, after: torch.Tensor) -> float:
    return float(relative_error(before.double()[None], after.double()[None]))


@pytest.mark.parametrize("family", kit.FAMILIES)
def test_groups_of_a_family_are_those_of_the_table(family: str, tmp_path: Path) -> None:
    space = Directory.open(kit.saved(tmp_path / family, family)).space
    assert set(groups.applicable(space)) == HOLDS[family]
    for name in set(groups.names()) - HOLDS[family] - {groups.ALL}:
        assert groups.allowed(name, space)
        with pytest.raises(UnsupportedError):
            groups.sample(name, space, 1, seeded())


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("family", kit.FAMILIES)
def test_a_moved_checkpoint_answers_the_same(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = Directory.open(kit.saved(tmp_path / "source", family, dtype))
    inputs = Library.of(source.path).inputs(seeded(), dtype)
    before = loaded(source.path, dtype, inputs)
    plain = source.read()
    for group in [*HOLDS[family], groups.ALL]:
        out = tmp_path / group
        augment(source, group, (0.2, 5.0), 0, out)
        moved = Directory.open(out).read()
        assert any(not torch.equal(moved[name], x) for name, x in plain.items()), group
        assert all(moved[name].dtype == x.dtype for name, x in plain.items())
        assert apart(before, loaded(out, dtype, inputs)) < BOUNDS[dtype], group


@pytest.mark.parametrize("family", kit.FAMILIES)
def test_moves_that_are_no_symmetry_are_seen(family: str, tmp_path: Path) -> None:
    source = Directory.open(kit.saved(tmp_path / "source", family))
    probe = Probe.of(source, seeded(), torch.float64)
    known = controls(source.space)
    rotary = family in ("llama", "qwen2", "gpt_neox")
    assert ("general-linear under rotary" in known) == rotary
    assert ("key-bias shift under rotary" in known) == (family in ("qwen2", "gpt_neox"))
    assert ("scale under gelu" in known) == (family not in ("llama", "qwen2"))
    for name, control in known.items():
        assert float(probe.error(control(source.space, source.exact(), seeded()))) > 1e-2, name


def test_augment_writes_what_from_pretrained_loads(run: Callable, tmp_path: Path) -> None:
    source = kit.saved(tmp_path / "source", "llama")
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.onnx").write_bytes(b"old weights")
    ran = run("augment", source, "--group", "general-linear", "--out", "copy", "--json")
    assert ran.code == 0
    row = ran.json["rows"][0]
    assert row["function_error"] < 1e-10
    assert row["function_error_float64"] < 1e-10
    assert "not copied: pytorch_model.onnx" in ran.err
    assert (tmp_path / "copy" / "tokenizer.json").read_text() == "{}"
    again = run("augment", source, "--out", "copy")
    assert again.code == 2


def test_shards_are_read_and_written_under_their_names(tmp_path: Path) -> None:
    source = kit.saved(tmp_path / "source", "gpt2", shard="8KB")
    opened = Directory.open(source)
    assert len(opened.files) > 2
    augment(opened, "all", (0.2, 5.0), 1, tmp_path / "copy")
    assert Directory.open(tmp_path / "copy").files == opened.files
    inputs = Library.of(source).inputs(seeded(), torch.float64)
    before, after = (loaded(p, torch.float64, inputs) for p in (source, tmp_path / "copy"))
    assert 0 < apart(before, after) < 1e-10


def test_torch_files_come_out_as_safetensors(tmp_path: Path) -> None:
    model = kit.make("bert")
    source = tmp_path / "source"
    model.config.architectures = ["BertForMaskedLM"]
    model.config.save_pretrained(source)
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    augment(Directory.open(source), "general-linear", (0.2, 5.0), 1, tmp_path / "copy")
    assert not (tmp_path / "copy" / "pytorch_model.bin").exists()
    inputs = Library.of(source).inputs(seeded(), torch.float64)
    after = loaded(tmp_path / "copy", torch.float64, inputs)
    assert 0 < apart(answers(model, inputs), after) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_stay_within_what_is_said_of_them(dtype: torch.dtype, tmp_path: Path) -> None:
    source = Directory.open(kit.saved(tmp_path / "source", "llama", dtype))
    low, high = source.scales()
    assert high / low < 2.5
    augment(source, "all", (low, high), 0, tmp_path / "copy")
    probe = Probe.of(source, seeded(), torch.float64)
    assert Directory.open(tmp_path / "copy").dtypes() == {dtype}
    assert 1e-5 < probe.error_of(tmp_path / "copy") < rounding(source)


def test_verify_invariance_of_a_directory(run: Callable, tmp_path: Path) -> None:
    source = kit.saved(tmp_path / "source", "gpt_neox", torch.float32)
    ran = run("verify-invariance", source, "--json", "--group", "general-linear")
    assert ran.code == 0, ran.err
    rows = {row["group"]: row for row in ran.json["rows"]}
    assert rows["general-linear"]["holds"]
    assert rows["general-linear under rotary"]["max_error"] > 1e-2
    told = run("inspect", source)
    assert told.code == 0
    assert "not scale: gelu is not homogeneous" in told.out
    refused = run("verify-invariance", source, "--group", "scale")
    assert refused.code == 3
    assert "gelu is not homogeneous" in refused.err


def test_without_the_library_a_copy_is_written_and_said_to_be_unproven(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = kit.saved(tmp_path / "source", "gpt2")
    monkeypatch.setitem(sys.modules, "transformers", None)
    ran = run("augment", source, "--group", "heads", "--out", "copy", "--json")
    assert ran.code == 0
    assert "not proven" in ran.err
    assert "qemcli[transformers]" in ran.err
    assert ran.json["rows"][0]["function_error"] is None
    assert run("verify-invariance", source).code == 5


def test_tensors_that_the_library_would_draw_are_missed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = kit.saved(tmp_path / "source", "vit")
    state = load_file(source / "model.safetensors")
    del state["classifier.weight"]
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"classifier\.weight"):
        Library.of(source).model(torch.float64)


def test_a_model_without_a_head_keeps_its_stream(tmp_path: Path) -> None:
    for family, kind in (("llama", "LlamaModel"), ("bert", "BertModel"), ("gpt2", "GPT2Model")):
        source = Directory.open(kit.saved(tmp_path / kind, family, kind=kind))
        assert "no head" in str(groups.allowed("stream", source.space)), kind
        probe = Probe.of(source, seeded(), torch.float64)
        g = groups.sample("all", source.space, 1, seeded())
        assert float(probe.error(groups.act(g, source.space, source.exact()))) < 1e-10


def test_a_config_of_an_unknown_class_is_answered(tmp_path: Path) -> None:
    source = kit.saved(tmp_path / "source", "gpt2")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["Elsewhere"]}))
    with pytest.raises(InputError, match="Elsewhere"):
        Library.of(source)


@pytest.mark.parametrize("said", [["Elsewhere"], [3], None])
def test_what_cannot_be_run_is_not_copied(said, run, tmp_path: Path) -> None:
    source = kit.saved(tmp_path / "source", "gpt2")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": said}))
    ran = run("augment", source, "--group", "heads", "--out", tmp_path / "copy")
    assert ran.code == 3
    assert "Traceback" not in ran.err
    assert not (tmp_path / "copy").exists()


def test_copies_are_all_written_or_none(run, tmp_path: Path) -> None:
    source = kit.saved(tmp_path / "source", "gpt2")
    taken = tmp_path / "copies" / "heads-1"
    taken.mkdir(parents=True)
    (taken / "mine").touch()
    call = ("augment", source, "--group", "heads", "--factor", 2, "--out", tmp_path / "copies")
    assert run(*call).code == 2
    assert not (tmp_path / "copies" / "heads-0").exists()
    assert run("augment", source, "--limit", 3, "--out", tmp_path / "other").code == 2
