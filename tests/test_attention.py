"""Batched small transformers against a plain torch module, one network at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qemcli import attention
from qemcli.errors import InputError, UnsupportedError
from qemcli.functions import probe_inputs, respond
from qemcli.spaces import Transformer, small_transformer

IMAGES = small_transformer(12, 3, 20, 2, 7, (2, 3))  # all widths differ
TEXTS = small_transformer(12, 3, 20, 2, 5)


def _draw(space: Transformer, count: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return space.unflatten(
        torch.randn(count, space.size, generator=generator, dtype=torch.float64) * 0.4
    )


class Plain(nn.Module):
    """One network, as its paper says it: residual-free blocks, norms without parameters."""

    def __init__(self, space: Transformer, w: dict[str, Tensor], i: int, heads: int = 3) -> None:
        super().__init__()
        self.w, self.heads, self.depth = {k: v[i] for k, v in w.items()}, heads, len(space.blocks)

    def embed(self, images: Tensor) -> Tensor:
        weight, bias = self.w["embedding.conv1.weight"], self.w["embedding.conv1.bias"]
        tokens = F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
        _, count, width = tokens.shape
        place = torch.zeros(count, width, dtype=torch.float64)
        for t in range(count):
            for i in range(0, width, 2):
                place[t, i] = math.sin(t / 10000 ** (i / width))
                place[t, i + 1] = math.cos(t / 10000 ** (i / width))
        return tokens + place

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        for i in range(self.depth):
            z, at = F.layer_norm(x, x.shape[-1:]), f"encoder.{i}"
            q, k, v = (
                (z @ self.w[f"{at}.attention.{n}.weight"].T).unflatten(2, (self.heads, -1))
                for n in ("queries", "keys", "values")
            )
            scores = torch.einsum("pthd,pshd->phts", q, k) / math.sqrt(q.shape[-1])
            if real is not None:
                scores = scores.masked_fill(~real[:, None, None], -math.inf)
            mixed = torch.einsum("phts,pshd->pthd", scores.softmax(-1), v).flatten(2)
            x = mixed @ self.w[f"{at}.attention.out_projection.weight"].T
            z = F.layer_norm(x, x.shape[-1:])
            x = self._linear(f"{at}.fc2", torch.relu(self._linear(f"{at}.fc1", z)))
        z = F.layer_norm(x, x.shape[-1:])
        shown = torch.ones_like(z[..., 0]) if real is None else real.to(z)
        mean = (z * shown[..., None]).sum(1) / shown.sum(1, keepdim=True)
        return self._linear("classifier.fc2", torch.relu(self._linear("classifier.fc1", mean)))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])


def test_images_are_read_as_by_a_plain_module() -> None:
    w = _draw(IMAGES)
    x = probe_inputs(IMAGES, 6, torch.Generator().manual_seed(0), torch.float64)
    found = respond(IMAGES, w, x)
    wanted = torch.stack([m(m.embed(x)) for i in range(3) for m in [Plain(IMAGES, w, i)]])
    assert (found - wanted).abs().max() < 1e-6  # the table of positions is float32
    other = torch.stack([m(m.embed(x)) for i in range(3) for m in [Plain(IMAGES, w, i, 2)]])
    assert (found - other).abs().max() > 1e-2  # the number of heads matters


def test_padding_is_not_read_unless_it_is_said_to_be() -> None:
    w = _draw(TEXTS)
    x = probe_inputs(TEXTS, 4, torch.Generator().manual_seed(0), torch.float64)[:, :5]
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    found = attention.respond(TEXTS, w, x, real)
    wanted = torch.stack([Plain(TEXTS, w, i)(x, real) for i in range(3)])
    assert (found - wanted).abs().max() < 1e-10
    changed = torch.where(real[..., None], x, x.flip(-1))
    assert (attention.respond(TEXTS, w, changed, real) - found).abs().max() < 1e-12
    assert (respond(TEXTS, w, changed) - respond(TEXTS, w, x)).abs().max() > 1e-2


def test_text_of_nothing_but_padding_has_an_answer() -> None:
    answer = attention.respond(
        TEXTS, _draw(TEXTS), torch.zeros(2, 5, 12), torch.zeros(2, 5, dtype=torch.bool)
    )
    assert answer.isfinite().all()


def test_attention_s_gradient_is_that_of_its_definition() -> None:
    qkv = torch.randn(2, 4, 18, dtype=torch.float64, requires_grad=True)
    hidden = torch.zeros(2, 1, 4, dtype=torch.float64)
    hidden[1, 0, 2:] = -math.inf
    for mask in (None, hidden):
        assert torch.autograd.gradcheck(
            lambda z, m=mask: attention.Attention.apply(z, 3, m), (qkv,)
        )


def test_many_networks_are_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = _draw(TEXTS, 7), torch.randn(3, 4, 12)
    whole = respond(TEXTS, w, x)
    monkeypatch.setattr(attention, "MEMORY", 1)
    assert torch.equal(respond(TEXTS, w, x), whole)


@pytest.mark.parametrize("shape", [(2, 12), (2, 4, 11), (2, 3, 12, 12)])
def test_inputs_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    for space in (IMAGES, TEXTS):
        with pytest.raises(InputError, match="do not fit"):
            respond(space, _draw(space), torch.zeros(shape))


def test_other_families_are_not_run() -> None:
    import dataclasses

    other = dataclasses.replace(TEXTS, family="bert")
    with pytest.raises(UnsupportedError, match="bert"):
        respond(other, _draw(TEXTS), torch.zeros(2, 4, 12))
