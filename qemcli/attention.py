"""Small transformers as functions: a batch of networks of one weight space, run on shared inputs or
each on its own.

The Small Transformer Zoo's network (Tran et al., arXiv:2410.04209), tokens x in rows:

    x <- embedding + sinusoids
    x <- sum_i softmax(q_i k_i^T / sqrt(d)) v_i W_O^i,   q, k, v of LN(x)    no residual sums
    x <- relu(LN(x) W_A + b_A) W_B + b_B
    y  = relu(mean_t LN(x) W_1 + b_1) W_2 + b_2

LN has no parameters. Padded tokens neither are attended to nor count in the mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qemcli.errors import InputError, UnsupportedError
from qemcli.spaces import Transformer

EPS = 1e-5  # of the norms, torch's
FAMILY = "small-transformer"
MEMORY = 2**25  # numbers of one layer held at a time
TOKENS = 16  # of random probes, where the networks do not say how many they read


def positions(tokens: int, width: int) -> Tensor:
    """(t, D) fixed sinusoids: sin and cos of t / 10000^(2i/D) in turn (Vaswani et al., 2017)."""
    rate = torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
    angle = torch.arange(tokens)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[:, :width]


def patches(images: Tensor, side: int) -> Tensor:
    """(p, channels, height, width) -> (p, t, channels side side), row by row; what is over at the
    right and below is not read."""
    return F.unfold(images, side, stride=side).transpose(1, 2)


def patch_side(space: Transformer) -> int:
    """Pixels of the side of a patch; 0 for networks of embedded tokens."""
    return space.sizes.get("u", 0)


def respond(
    space: Transformer, w: Mapping[str, Tensor], x: Tensor, real: Tensor | None = None
) -> Tensor:
    """Run b networks on p inputs: (b, p, outputs), logits, in the dtype of `w`.

    `x` is (p, channels, height, width) where the networks embed patches, else embedded tokens with
    their positions, (p, t, D), of which only those in `real` (p, t) count. Raises InputError where
    the inputs do not fit, UnsupportedError for other families.
    """
    _check(space, x)
    space.check(w)
    x = x.to(w[space.tensors[0].name])
    side = patch_side(space)
    x = patches(x, side) if side else x
    batch = len(w[space.tensors[0].name])
    step = max(1, MEMORY // (x.shape[0] * x.shape[1] * max(3 * space.width, space.sizes["f1"])))
    answers = []
    for i in range(0, batch, step):
        part = {name: v[i : i + step] for name, v in w.items()}
        count = len(part[space.tensors[0].name])
        own = x.expand(count, *x.shape)
        answers.append(
            logits(space, part, own, None if real is None else real.expand(count, *real.shape))
        )
    return torch.cat(answers) if answers else x.new_zeros(0, len(x), space.sizes["y"])


def probe_inputs(
    space: Transformer, count: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal inputs of TOKENS tokens: images (count, channels, h, w), or embedded tokens
    (count, t, D)."""
    _supported(space)
    side = patch_side(space) * math.isqrt(TOKENS)
    shape = (space.sizes["x"], side, side) if side else (TOKENS, space.width)
    return torch.randn(count, *shape, generator=generator, dtype=dtype)


def _supported(space: Transformer) -> None:
    if space.family != FAMILY or space.placement != "plain":
        raise UnsupportedError(
            f"no way is known to run networks of the family {space.family}",
            f"their weights can still be read; {FAMILY} can be run",
        )


def _check(space: Transformer, x: Tensor) -> None:
    _supported(space)
    side = patch_side(space)
    if side:
        fits = x.dim() == 4 and x.shape[1] == space.sizes["x"] and min(x.shape[2:]) >= side
    else:
        fits = x.dim() == 3 and x.shape[2] == space.width
    if not fits:
        reads = f"{space.sizes['x']} channels in patches of {side}" if side else f"{space.width}"
        raise InputError(
            f"inputs of shape {tuple(x.shape)} do not fit a {space.family} that reads {reads}",
            "images are (p, channels, height, width), embedded tokens (p, t, D)",
        )


def logits(
    space: Transformer,
    w: Mapping[str, Tensor],
    x: Tensor,
    real: Tensor | None = None,
    drops: Sequence[Tensor] | None = None,
) -> Tensor:
    """Answers (b, p, outputs) of each network on its own inputs.

    `x` is (b, p, t, channels side side), patches, or (b, p, t, D), embedded tokens; `real`
    (b, p, t) is False for padding; `drops` are factors (b, p, t, D) on the embedding and behind
    each attention and feed-forward, for training.
    """
    _, p, t, _ = x.shape
    x = x.flatten(1, 2)
    if patch_side(space):
        kernel = w["embedding.conv1.weight"].flatten(2)
        x = torch.baddbmm(w["embedding.conv1.bias"][:, None], x, kernel.transpose(1, 2))
        x = (x.unflatten(1, (p, t)) + positions(t, space.width).to(x)).flatten(1, 2)
    left = iter(() if drops is None else drops)
    x = _dropped(x, left)
    hidden = None if real is None else _hidden(real, x.dtype)
    for i, heads in enumerate(space.heads):
        x = _dropped(
            _attended(w, f"encoder.{i}.attention", x, heads[0] * heads[1], t, hidden), left
        )
        x = _dropped(_fed(w, f"encoder.{i}", x), left)
    x = _mean(_normed(x).unflatten(1, (p, t)), real)
    x = torch.relu(_linear(w, "classifier.fc1", x))
    return _linear(w, "classifier.fc2", x)


def _dropped(x: Tensor, left: Any) -> Tensor:
    factor = next(left, None)
    return x if factor is None else x * factor.flatten(1, 2)


def _hidden(real: Tensor, dtype: torch.dtype) -> Tensor:
    """(b p, 1, t) to add to scores: -inf where a token is padding. Where all are, none is."""
    away = ~(real | ~real.any(-1, keepdim=True)).flatten(0, 1)
    return torch.zeros(away.shape, dtype=dtype).masked_fill(away, -math.inf)[:, None]


def _mean(x: Tensor, real: Tensor | None) -> Tensor:
    """The mean over the tokens of (b, p, t, D) that are real."""
    if real is None:
        return x.mean(2)
    weight = real.to(x)[:, :, None]
    count = weight.sum(-1).clamp_min(1)
    return torch.matmul(weight, x)[:, :, 0] / count


def _linear(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return torch.baddbmm(w[f"{name}.bias"][:, None], x, w[f"{name}.weight"].transpose(1, 2))


def _fed(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    z = _normed(x)
    return _linear(w, f"{name}.fc2", torch.relu(_linear(w, f"{name}.fc1", z)))


def _attended(
    w: Mapping[str, Tensor], name: str, x: Tensor, heads: int, tokens: int, hidden: Tensor | None
) -> Tensor:
    z = _normed(x)
    fused = torch.cat([w[f"{name}.{part}.weight"] for part in ("queries", "keys", "values")], 1)
    qkv = torch.bmm(z, fused.transpose(1, 2))
    mixed = Attention.apply(qkv.view(-1, tokens, qkv.shape[-1]), heads, hidden)
    return torch.bmm(
        mixed.view(len(x), x.shape[1], -1), w[f"{name}.out_projection.weight"].transpose(1, 2)
    )


def _normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


class Attention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v of all heads, (n, t, 3 h d) -> (n, t, h d). torch's own is
    several times as slow on a dozen tokens. Differentiable once."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, hidden: Tensor | None) -> Tensor:
        n, t, _ = qkv.shape
        q, k, v = qkv.view(n, t, 3, heads, -1).permute(2, 0, 3, 1, 4).reshape(3, n * heads, t, -1)
        scale = q.shape[-1] ** -0.5
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
        if hidden is not None:
            scores.view(n, heads, t, t).add_(hidden[:, None])
        weight = torch.softmax(scores, -1)
        ctx.save_for_backward(q, k, v, weight)
        ctx.shape = (n, t, heads, scale)
        return torch.bmm(weight, v).view(n, heads, t, -1).transpose(1, 2).reshape(n, t, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        q, k, v, weight = ctx.saved_tensors
        n, t, heads, scale = ctx.shape
        g = grads[0].view(n, t, heads, -1).transpose(1, 2).reshape(n * heads, t, -1)
        out = q.new_empty(3, n * heads, t, q.shape[-1])
        torch.bmm(weight.transpose(1, 2), g, out=out[2])
        slope = torch.bmm(g, v.transpose(1, 2))
        slope = torch._softmax_backward_data(slope, weight, -1, weight.dtype).mul_(scale)
        torch.bmm(slope, k, out=out[0])
        torch.bmm(slope.transpose(1, 2), q, out=out[1])
        back = out.view(3, n, heads, t, -1).permute(1, 3, 0, 2, 4)
        return back.reshape(n, t, -1), None, None
