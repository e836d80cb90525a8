"""Networks as functions: a batch of checkpoints of one weight space, run on shared inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from qemcli import attention
from qemcli.errors import InputError, UnsupportedError
from qemcli.spaces import (
    Chain,
    Layer,
    Layered,
    Residual,
    Transformer,
    WeightSpace,
    chain_of,
    layered_of,
)

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,  # torch's slope, 0.01
    "abs": torch.abs,
    "identity": lambda z: z,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "erf": torch.erf,
    "arctan": torch.arctan,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": F.softplus,
    "elu": F.elu,
}
MEMORY = 2**25  # numbers of one layer held at a time; more networks than that are run in chunks
SIDES = range(8, 65)  # image sides that are tried where the checkpoint does not say one


def runs(space: WeightSpace) -> bool:
    """True where `respond` can run these networks: the activation is known, and of transformers the
    architecture is the Small Transformer Zoo's (others are run by their own library)."""
    if isinstance(space, Transformer):
        return space.family == attention.FAMILY
    return isinstance(space, Layered) and space.activation is not None


def respond(space: WeightSpace, w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Run b networks on p inputs: (b, p, outputs), logits, in the dtype of `w`.

    `x` is (p, inputs) for all of them, or (b, p, inputs), each network's own; for CNNs
    (p, channels, height, width), for all; for transformers see attention.respond. sin is
    sin(w0 z), and the space's offset is added at the end. Raises InputError where the activation
    is not known or the inputs do not fit.
    """
    if isinstance(space, Transformer):
        return attention.respond(space, w, x)
    space = layered_of(space, "running networks")
    space.check(w)
    if space.activation is None:
        raise InputError("the networks' activation is not known", "pass --activation NAME")
    _check(space, x)
    batch = len(w[space.tensors[0].name])
    own = x.dim() == 3
    count = x.shape[1] if own else len(x)
    widest = max(space.widths) * count * (x[0, 0].numel() if x.dim() == 4 else 1)
    x, step = x.to(w[space.tensors[0].name]), max(1, MEMORY // widest)
    outputs = [
        _run(space, {k: v[i : i + step] for k, v in w.items()}, x[i : i + step] if own else x)
        for i in range(0, batch, step)
    ]
    return torch.cat(outputs) if outputs else x.new_zeros(0, count, space.layers[-1].rows)


def differentiate(space: Chain, w: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """What `respond` gives, (b, p, outputs), and its slopes (b, p, outputs, inputs) at `x`.

    Of SIRENs, `x` as there; differentiable once more. Raises InputError as `respond`, and for
    other networks.
    """
    space.check(w)
    if space.activation != "sin" or space.layers[0].conv:
        raise InputError(
            "slopes are of SIRENs; these are other networks", "take their answers only"
        )
    _check(space, x)
    w0 = space.forward.w0
    batch = len(w[space.tensors[0].name])
    h = x.to(w[space.tensors[0].name]).expand(batch, *x.shape[-2:])
    slope = torch.eye(h.shape[2]).to(h)[:, None, :].expand(batch, h.shape[2], 1, h.shape[2])
    for layer in space.layers:
        h = torch.einsum("bpk,bjk->bpj", h, w[layer.weight])
        h = h + w[layer.bias][:, None] if layer.bias else h
        slope = torch.einsum("bipk,bjk->bipj", slope, w[layer.weight])
        if layer is not space.layers[-1]:
            h, slope = (w0 * h).sin(), slope * (w0 * (w0 * h).cos())[:, None]
    return h + space.forward.offset, slope.permute(0, 2, 3, 1)


def probe_inputs(
    space: WeightSpace,
    count: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Random inputs to tell functions apart: (count, inputs), for CNNs (count, channels, h, w).

    Coordinates in [-1, 1] for SIRENs, standard normal numbers elsewhere. Where a CNN's image size
    is not known, one is chosen on which every layer is defined; UnsupportedError where there is
    none.
    """
    if isinstance(space, Transformer):
        return attention.probe_inputs(space, count, generator, dtype)
    space = layered_of(space, "random inputs")
    inputs = space.layers[0].cols
    if space.family == "siren":
        return 2 * torch.rand(count, inputs, generator=generator, dtype=dtype) - 1
    shape = image_shape(space) if space.layers[0].conv else (inputs,)
    return torch.randn(count, *shape, generator=generator, dtype=dtype)


def image_shape(space: Layered) -> tuple[int, int, int]:
    """(channels, height, width) of the image a CNN reads: its own, or the smallest that fits."""
    channels = space.layers[0].cols
    if space.forward.image:
        _, height, width = space.forward.image
        return channels, height, width
    squares = [(side, side) for side in SIDES]
    oblong = sorted(
        ((a, b) for a in SIDES for b in SIDES if a != b), key=lambda s: abs(s[0] - s[1])
    )
    for height, width in squares + oblong:
        if _fits(space, height, width):
            return channels, height, width
    raise UnsupportedError(
        "no image from 8x8 to 64x64 gives as many positions as the first dense layer reads",
        "state the image size, stride, padding and pooling of the networks",
    )


def _fits(space: Layered, height: int, width: int) -> bool:
    """True where all layers are defined on such an image and the dense one reads its positions."""
    forward = space.forward
    for i, layer in enumerate(space.layers):
        if not layer.conv:
            pooled = forward.junction == "pool"
            return layer.taps == (1 if pooled else height * width)
        kernel = space[layer.weight].unfolded[2:]
        stride, padding = (
            space.step(i)
            if isinstance(space, Residual)
            else (forward.stride, (forward.padding, forward.padding))
        )
        height, width = (
            (side + 2 * zeros - k) // stride + 1
            for side, k, zeros in zip((height, width), kernel, padding, strict=True)
        )
        if forward.pooling != "none":
            height, width = height // 2, width // 2
        if min(height, width) < 1:
            return False
    return True


def _check(space: Layered, x: Tensor) -> None:
    conv = space.layers[0].conv
    fits = x.dim() == 4 if conv else x.dim() in (2, 3)
    if not fits or x.shape[1 if conv else -1] != space.layers[0].cols:
        raise InputError(
            f"inputs of shape {tuple(x.shape)} do not fit a {space.family} "
            f"that reads {space.layers[0].cols} channels"
        )


def _activate(space: Layered, z: Tensor) -> Tensor:
    if space.activation == "sin":
        z = space.forward.w0 * z
    return FUNCTIONS[space.activation or ""](z)


def _run(space: Layered, w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    if isinstance(space, Residual):
        return _run_sums(space, w, x)
    run = _run_convolutions if space.layers[0].conv else _run_dense
    return run(chain_of(space, "running networks"), w, x)


def _run_dense(space: Chain, w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return _dense(space, w, x.expand(len(w[space.tensors[0].name]), *x.shape[-2:]), space.layers)


def _dense(space: Chain, w: Mapping[str, Tensor], h: Tensor, layers: tuple[Layer, ...]) -> Tensor:
    """h (b, p, inputs) through dense layers, the last of them without activation."""
    for layer in layers:
        weight = w[layer.weight].transpose(1, 2)
        h = torch.baddbmm(w[layer.bias][:, None], h, weight) if layer.bias else torch.bmm(h, weight)
        if layer is not layers[-1]:
            h = _activate(space, h)
    return h + space.forward.offset


def _run_convolutions(space: Chain, w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The b networks stand side by side as groups of channels: (p, b*channels, height, width)."""
    batch, forward = len(w[space.tensors[0].name]), space.forward
    h, groups = x, 1
    convolutions = [layer for layer in space.layers if layer.conv]
    for layer in convolutions:
        bias = w[layer.bias].flatten(0, 1) if layer.bias else None
        h = F.conv2d(
            h, w[layer.weight].flatten(0, 1), bias, forward.stride, forward.padding, groups=groups
        )
        groups = batch
        if layer is space.layers[-1]:
            break
        h = _pooled(forward.pooling, _activate(space, h))
    h = _joined(space, h, batch)
    dense = space.layers[len(convolutions) :]
    return _dense(space, w, h, dense) if dense else h + forward.offset


def _joined(space: Layered, h: Tensor, batch: int) -> Tensor:
    """Images (p, b*channels, height, width) -> what the first dense layer reads, (b, p, cols)."""
    h = h.unflatten(1, (batch, -1)).transpose(0, 1)
    return h.mean(dim=(3, 4)) if space.forward.junction == "pool" else h.flatten(2)


def _run_sums(space: Residual, w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """As `_run_convolutions`, with what earlier layers gave added before the activation."""
    batch = len(w[space.tensors[0].name])
    first, last = space.layers[0], space.layers[-1]
    h, outputs = x if first.conv else x.expand(batch, *x.shape[-2:]), list[Tensor]()
    for i, layer in enumerate(space.layers):
        if layer.conv:
            bias = w[layer.bias].flatten(0, 1) if layer.bias else None
            groups = batch if i else 1
            h = F.conv2d(h, w[layer.weight].flatten(0, 1), bias, *space.step(i), groups=groups)
        else:
            h = _joined(space, h, batch) if i and space.layers[i - 1].conv else h
            h = torch.einsum("bpk,bjk->bpj", h, w[layer.weight])
            h = h + w[layer.bias][:, None] if layer.bias else h
        h = h + outputs[space.added[i]] if space.added[i] >= 0 else h
        if layer is not last:
            h = _activate(space, h)
        outputs.append(h)
    return (_joined(space, h, batch) if last.conv else h) + space.forward.offset


def _pooled(pooling: str, h: Tensor) -> Tensor:
    if pooling == "none":
        return h
    return F.max_pool2d(h, 2) if pooling == "max" else F.avg_pool2d(h, 2)
