"""Every format: what is read, what is skipped and why, and at what rate it is indexed.

CPU seconds of one thread, files in the system's cache. QEM_BENCH_COUNT networks a format.
"""

import io
import json
import os
import pickle
import sys
import tarfile
import time

import h5py
import numpy as np
import onnx
import pandas
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import save_file

from qemcli import spaces
from qemcli.checkpoints import open_checkpoint
from qemcli.zoos.indexing import index
from qemcli.zoos.store import Store
from qemcli.zoos.zoo import Zoo

COUNT = int(os.environ.get("QEM_BENCH_COUNT", "500"))
SPACE = spaces.cnn([1, 16, 16, 16], 10)
FLAT = torch.randn(COUNT, SPACE.size, generator=torch.Generator().manual_seed(0))


def state(i):
    return {name: w[0].clone() for name, w in SPACE.unflatten(FLAT[i : i + 1]).items()}


def each(root, suffix, write):
    root.mkdir(parents=True)
    for i in range(COUNT):
        write(state(i), root / f"{i:05d}{suffix}")
    return root


def safetensors(root):
    """one mapped header, tensors of any dtype"""
    each(root, ".safetensors", lambda w, f: save_file({**w, "steps": torch.tensor(3)}, f))
    (root / "pointer.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    return root


def safetensors_labelled(root):
    """the same, with other metadata in every header: activation, labels, config.*"""

    def write(w, file):
        said = {"activation": "relu", "test_accuracy": f"0.{file.stem}", "config.lr": "0.1"}
        save_file(w, file, said)

    return each(root, ".safetensors", write)


def safetensors_bf16(root):
    """bf16, fp16, fp8 decoded to float32"""
    half = torch.bfloat16
    return each(
        root, ".safetensors", lambda w, f: save_file({n: x.to(half) for n, x in w.items()}, f)
    )


def transformers_directory(root):
    """config.json with model.safetensors, in one file or in shards of an index"""
    for i in range(COUNT):
        folder, w = root / f"{i:05d}", state(i)
        folder.mkdir(parents=True)
        first = dict(list(w.items())[:4])
        shards = {"model-00001-of-00002.safetensors": first}
        shards["model-00002-of-00002.safetensors"] = {n: x for n, x in w.items() if n not in first}
        placed = {n: file for file, held in shards.items() for n in held}
        for file, held in shards.items():
            save_file(held, folder / file)
        text = json.dumps({"metadata": {}, "weight_map": placed})
        (folder / "model.safetensors.index.json").write_text(text)
        (folder / "tokenizer.json").write_text("{}")
    (root / "00000" / "model-00002-of-00002.safetensors").unlink()
    return root


def torch_zip(root):
    """a state dict of torch.save, located as data: no pickle is run"""
    each(root, ".pt", lambda w, f: torch.save({**w, "steps": torch.tensor(3)}, f))
    (root / "module.pt").write_bytes(pickle.dumps(print))
    return root


def torch_legacy(root):
    """torch.save before 1.6"""
    return each(root, ".pth", lambda w, f: torch.save(w, f, _use_new_zipfile_serialization=False))


def lightning(root):
    """wrapped: state_dict, model., module., _orig_mod."""

    def write(w, file):
        held = {"state_dict": {f"model.{n}": x for n, x in w.items()}, "epoch": 3}
        moments = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}
        torch.save({**held, "optimizer_states": [moments]}, file)

    return each(root, ".ckpt", write)


def npz(root):
    """one array a tensor"""
    each(root, ".npz", lambda w, f: np.savez(f, **{n: x.numpy() for n, x in w.items()}))
    np.savez(root / "objects.npz", a=np.array([{}], dtype=object))
    return root


def keras(root):
    """Keras 2 and 3 .h5 (extra keras): kernels turned to torch's layout"""

    def write(w, file):
        with h5py.File(file, "w") as opened:
            for layer in ("conv1", "conv2", "conv3", "fc"):
                kernel = w[f"{layer}.weight"].numpy()
                kernel = kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T
                opened.create_dataset(f"layers/{layer}/vars/0", data=kernel)
                opened.create_dataset(f"layers/{layer}/vars/1", data=w[f"{layer}.bias"].numpy())
            opened.create_dataset("optimizer/vars/0", data=np.ones(3, "f4"))

    return each(root, ".h5", write)


def onnx_models(root):
    """initialisers of a chain of nodes (extra onnx)"""
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, 9])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, 10])
    nodes = [
        helper.make_node("Gemm", ["x", "0.weight", "0.bias"], ["a"], transB=1),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "2.weight", "2.bias"], ["y"], transB=1),
    ]

    def write(w, file):
        flat = torch.cat([t.flatten() for t in w.values()])[:4770].numpy()
        sizes = {"0.weight": (238, 9), "0.bias": (238,), "2.weight": (10, 238), "2.bias": (10,)}
        at, held = 0, []
        for name, shape in sizes.items():
            held.append(
                numpy_helper.from_array(flat[at : at + np.prod(shape)].reshape(shape), name)
            )
            at += int(np.prod(shape))
        onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y], held)), file)

    return each(root, ".onnx", write)


def small_cnn_zoo(root):
    """weights.npy mapped, metrics.csv.gz, layout.csv"""
    root.mkdir(parents=True)
    lines, at = ["varname,start_idx,end_idx,size,shape"], 0
    for layer in ("conv1", "conv2", "conv3", "fc"):
        kernel = SPACE.shapes[f"{layer}.weight"]
        kernel = (*kernel[2:], kernel[1], kernel[0])
        for part, shape in (("bias:0", (kernel[-1],)), ("kernel:0", kernel)):
            size = int(np.prod(shape))
            lines.append(f'sequential/{layer}/{part},{at},{at + size},{size},"{shape}"')
            at += size
    (root / "layout.csv").write_text("\n".join(lines) + "\n")
    np.save(root / "weights.npy", FLAT.numpy())
    table = {"config.activation": "relu", "modeldir": [f"/m/{i}" for i in range(COUNT)]}
    pandas.DataFrame({**table, "step": 86, "test_accuracy": 0.5}).to_csv(root / "metrics.csv")
    return root


def weights2weights(root):
    """one tensor [networks, parameters] in a torch file, mapped; listed as LoRA adapters"""
    root.mkdir(parents=True)
    torch.save(FLAT, root / "all_weights.pt")
    return root


def nfn_sirens(root):
    """archives (tar, zip, tar.gz) of torch files, read in place"""
    sirens = spaces.siren([2, 64, 64, 10])
    root.mkdir(parents=True)
    with tarfile.open(root / "siren.tar", "w") as archive:
        for i in range(COUNT):
            flat = torch.randn(1, sirens.size, generator=torch.Generator().manual_seed(i))
            buffer = io.BytesIO()
            torch.save({n: w[0].clone() for n, w in sirens.unflatten(flat).items()}, buffer)
            info = tarfile.TarInfo(f"siren_mnist_wts/randinit_smaller_{i % 10}s/net{i}.pth")
            info.size = len(buffer.getvalue())
            archive.addfile(info, io.BytesIO(buffer.getvalue()))
        link = tarfile.TarInfo("siren_mnist_wts/randinit_smaller_0s/net9.pth")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    return root / "siren.tar"


def our_shards(root):
    """zoo.json, index.parquet and shards [n, D] of safetensors, mapped"""
    store = Store(root)
    names = [{"checkpoint": f"run-{i:05d}", "split": "train"} for i in range(COUNT)]
    store.write(0, SPACE, FLAT.numpy(), names)
    store.finish(1, {"name": "bench", "licence": "cc0-1.0"})
    return root


MAKERS = (
    safetensors, safetensors_labelled, safetensors_bf16, transformers_directory, torch_zip,
    torch_legacy, lightning, npz, keras, onnx_models, small_cnn_zoo, weights2weights, nfn_sirens,
    our_shards,
)  # fmt: skip


def skipped(path, summary):
    """Why something is left out: tensors of the first checkpoint, files, what is only listed."""
    why = {item["reason"].split(": ")[-1] for item in summary["failed"]}
    why |= {item["reason"] for item in summary.get("left_out", ())}
    why |= set(summary.get("only_listed", {}))
    first = (
        next((f for f in sorted(path.glob("0*")) if f.is_file()), None) if path.is_dir() else None
    )
    if first is not None:
        why |= {reason for _, reason in open_checkpoint(first).space().skipped}
    return "; ".join(sorted(why)) or "nothing"


def size_of(path):
    files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
    return sum(f.stat().st_size for f in files)


@pytest.mark.bench
@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_rate(maker, tmp_path, monkeypatch):
    monkeypatch.setenv("QEM_CACHE", str(tmp_path / "cache"))
    path = maker(tmp_path / "z")
    summary, seconds = {}, []
    for turn in range(3):
        started = time.process_time()
        summary = index(path, out=tmp_path / f"out{turn}")
        seconds.append(time.process_time() - started)
    count, taken = summary["checkpoints"], min(seconds)
    assert COUNT - 1 <= count <= COUNT
    assert len(Zoo.open(tmp_path / "out0")) == count
    if maker is MAKERS[0]:
        sys.stderr.write(
            "\n| format | what is read | what is skipped, and why | rate |\n|---|---|---|---|"
        )
    rate = f"{count / taken:,.0f}/s, {size_of(path) / taken / 1e6:,.0f} MB/s"
    name = maker.__name__.replace("_", " ")
    sys.stderr.write(f"\n| {name} | {maker.__doc__} | {skipped(path, summary)} | {rate} |")
