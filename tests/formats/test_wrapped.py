"""Checkpoints as training tools leave them: wrapped, prefixed, in half precision, with the state of
the optimiser beside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qemcli.checkpoints import open_checkpoint

MODULE = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
STATE = MODULE.state_dict()


def lightning(prefix="model."):
    """What `Trainer.save_checkpoint` writes: 2.x, with a callback, a metric and two optimisers."""
    moments = {i: {"step": torch.tensor(1.0), "exp_avg": t} for i, t in enumerate(STATE.values())}
    optimizer = {"state": moments, "param_groups": [{"lr": 0.1, "params": [0, 1, 2, 3]}]}
    return {
        "epoch": 7,
        "global_step": 350,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {
            **{f"{prefix}{n}": t for n, t in STATE.items()},
            f"{'module.' * prefix.startswith('module')}val_accuracy.tp": torch.tensor([3, 4]),
        },
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 8}}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.25), "dirpath": "x"}},
        "optimizer_states": [optimizer],
        "lr_schedulers": [{"base_lrs": [0.1], "last_epoch": 8}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "activation": "relu", "widths": [3, 5, 2]},
    }


@pytest.mark.parametrize(
    "prefix", ["model.", "model._orig_mod.", "_forward_module.model.", "module.model.", ""]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_lightning_checkpoint_is_its_network_and_the_rest_is_told(tmp_path, prefix, zipped):
    file = tmp_path / "last.ckpt"
    with file.open("wb") as out:
        torch.save(lightning(prefix), out, _use_new_zipfile_serialization=zipped)
    found = open_checkpoint(file)
    space = found.space()
    inner = prefix.replace("_orig_mod.", "").replace("_forward_module.", "")
    inner = inner.removeprefix("module.")
    assert [n for n in found.shapes if "val_" not in n] == [inner + n for n in STATE]
    assert (space.widths, space.activation, found.coverage(space)) == ((3, 5, 2), "relu", 1.0)
    expected = torch.cat([t.flatten() for t in STATE.values()]).numpy()
    np.testing.assert_array_equal(found.row(space), expected)
    assert (found.metadata["epoch"], found.metadata["global_step"]) == (7, 350)
    assert found.metadata["config.lr"] == 0.1
    reasons = dict(space.skipped)
    outside = "callbacks.ModelCheckpoint.best_model_score"
    assert reasons[outside] == "outside 'state_dict'"
    assert reasons["optimizer_states.0.state.0.exp_avg"] == "outside 'state_dict'"
    assert "counter" in reasons["val_accuracy.tp"]


@pytest.mark.parametrize(
    "wrapped",
    [
        {"model": {"module": STATE}, "iteration": 3},
        {"module": STATE, "optimizer": {"state": {}}, "dp_world_size": 1},
        {"model_state": {f"_orig_mod.{n}": t for n, t in STATE.items()}},
        {f"module.module.{n}": t for n, t in STATE.items()},
        {f"module._orig_mod.{n}": t for n, t in STATE.items()},
        {f"_orig_mod.module.{n}": t for n, t in STATE.items()},
    ],
)
def test_wrappers_of_every_tool_are_taken_off(tmp_path, wrapped):
    torch.save(wrapped, tmp_path / "a.pt")
    found = open_checkpoint(tmp_path / "a.pt")
    assert list(found.shapes) == list(STATE)


def test_name_that_only_looks_like_a_wrapper_stays(tmp_path):
    state = {"module.0.weight": STATE["0.weight"], "head.weight": STATE["2.weight"]}
    torch.save(state, tmp_path / "a.pt")
    assert list(open_checkpoint(tmp_path / "a.pt").shapes) == list(state)
    clash = {"_orig_mod.0.weight": torch.ones(2, 2), "0.weight": torch.zeros(2, 2)}
    torch.save(clash, tmp_path / "b.pt")
    assert list(open_checkpoint(tmp_path / "b.pt").shapes) == list(clash)


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64],
    ids=str,
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_every_precision_is_read_as_torch_reads_it(tmp_path, dtype, suffix):
    state = {name: tensor.to(dtype) for name, tensor in STATE.items()}
    file = tmp_path / f"a.{suffix}"
    torch.save(state, file) if suffix == "pt" else save_file(state, file)
    found = open_checkpoint(file)
    assert set(found.dtypes.values()) == {str(dtype).removeprefix("torch.")}
    space = found.space()
    assert space.widths == (3, 5, 2)
    for name, array in found.tensors().items():
        wide = state[name].to(torch.float64 if dtype == torch.float64 else torch.float32)
        assert array.dtype == wide.numpy().dtype
        np.testing.assert_array_equal(array, wide.numpy())
