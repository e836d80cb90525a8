"""Polynomial layers: their products are the paper's terms, one by one."""

import block_kit
import pytest
import torch
from block_kit import GROUPS, NEURONS, WIDTH

from qemcli.layers import low_rank, polynomial, published_init
from qemcli.layers.block_features import Attention, Feedforward, feedforward, products, shared

IN, OUT, BLOCKS = 3, 4, 2
D, A = WIDTH, NEURONS
NAMES = ("query", "key", "value", "out", "up", "up_bias", "down", "down_bias")


def features(rng, c=IN, batch=3):
    """Random features of c channels: factors with a channel axis, and the feed-forward."""

    def normal(*shape):
        return torch.randn(batch, c, *shape, generator=rng, dtype=torch.float64)

    heads = ((GROUPS, D, 3), (GROUPS, D, 3), (GROUPS, D, 4), (GROUPS, 4, D))
    return tuple(normal(*shape) for shape in (*heads, (D, A), (A,), (A, D), (D,)))


def coefficients(layer, l):
    """The coefficient tensors of every term, by (target, number), cut out of the products."""
    d, c, e = layer.width, layer.c_in, layer.c_out
    sizes = [c * d * d, c * d, c, c * d, c, c * d]
    shapes = [(c, d, d), (c, d), (c,), (c, d), (c,), (c, d)]
    whole = dict(
        zip(
            ("up", "up_bias", "down", "down_bias"),
            layer.whole.weight[l].T.split([e, e, e * d, e * d]),
            strict=True,
        )
    )
    bias = dict(zip(whole, layer.whole.bias[l].split([e, e, e * d, e * d]), strict=True))
    neuron = dict(zip(whole, layer.neuron.weight[l].T.split([e, e, e * d]), strict=False))
    found = {}
    for name, rows in whole.items():
        lead = (e,) if name.startswith("up") else (e, d)
        parts = [
            x.reshape(*lead, *shape)
            for x, shape in zip(rows.split(sizes, dim=1), shapes, strict=True)
        ]
        own = []
        if name in neuron:
            own = [
                x.reshape(*lead, *shape)
                for x, shape in zip(
                    neuron[name].split([c, c * d, c], dim=1), [(c,), (c, d), (c,)], strict=True
                )
            ]
        found[name] = (parts, own, bias[name].reshape(lead))
    inputs = layer.input.weight[l].T.split([c * d, c], dim=1)
    found["input"] = (inputs[0].reshape(e, c, d), inputs[1])
    return found


def slow(layer, l, x):
    """Section 3.1 of the paper's appendix, term by term: e, f channels out and in; h heads."""
    q, k, v, o, up, up_bias, down, down_bias = x
    S = torch.einsum("bfhpd,bfhqd->bfpq", q, k)
    R = torch.einsum("bfhpd,bfhdq->bfpq", v, o)
    c = coefficients(layer, l)
    phi = layer.maps[:, l]
    new = {
        name: torch.einsum("efij,bfhjd->behid", phi[i], factor)
        for i, (name, factor) in enumerate((("query", q), ("key", k), ("value", v)))
    }
    spread, keep = layer.out[:, l]
    new["out"] = torch.einsum("ef,bfhdk->behd", spread, o)[..., None] + torch.einsum(
        "ef,bfhdk->behdk", keep, o
    )

    def all_of(parts, lead):
        """The terms that read the whole network."""
        return (
            torch.einsum(f"bfpq,e{lead}fpq->be{lead}", S, parts[0])
            + torch.einsum(f"bfpq,e{lead}fp->be{lead}", R, parts[1])
            + torch.einsum(f"bfpq,e{lead}f->be{lead}", up, parts[2])
            + torch.einsum(f"bfpq,e{lead}fq->be{lead}", down, parts[3])
            + torch.einsum(f"bfq,e{lead}f->be{lead}", up_bias, parts[4])
            + torch.einsum(f"bfq,e{lead}fq->be{lead}", down_bias, parts[5])
        )

    parts, own, const = c["up"]
    of_input, of_row = c["input"]
    new["up"] = (
        (all_of(parts, "") + const)[..., None, None]
        + torch.einsum("bfpj,efp->bej", R, of_input)[..., None]
        + torch.einsum("bfjq,ef->bej", up, of_row)[..., None]
        + torch.einsum("bfpk,ef->bek", up, own[0])[:, :, None]
        + torch.einsum("bfjk,ef->bejk", up, layer.entry[l])
        + torch.einsum("bfkq,efq->bek", down, own[1])[:, :, None]
        + torch.einsum("bfk,ef->bek", up_bias, own[2])[:, :, None]
    )
    parts, own, const = c["up_bias"]
    new["up_bias"] = (
        (all_of(parts, "") + const)[..., None]
        + torch.einsum("bfpk,ef->bek", up, own[0])
        + torch.einsum("bfkq,efq->bek", down, own[1])
        + torch.einsum("bfk,ef->bek", up_bias, own[2])
    )
    parts, own, const = c["down"]
    new["down"] = (
        (all_of(parts, "k") + const)[:, :, None]
        + torch.einsum("bfpj,ekf->bejk", up, own[0])
        + torch.einsum("bfjq,ekfq->bejk", down, own[1])
        + torch.einsum("bfj,ekf->bejk", up_bias, own[2])
    )
    parts, _, const = c["down_bias"]
    new["down_bias"] = all_of(parts, "k") + const
    return new


def roles_of(x, channel):
    roles = {name: part[:, channel] for name, part in zip(NAMES, x, strict=True)}
    return roles | {name: roles[name][:, :, None] for name in ("query", "out")}


def first(layer, x):
    """The layer on features of one channel in each of two blocks."""
    blocks = [roles_of(part, 0) for part in x]
    return blocks, *layer(products(blocks), feedforward(blocks))


def compared(found, wanted):
    gaps = []
    for name, x in wanted.items():
        have = found[name].reshape(x.shape)
        gaps.append(((have - x).abs().max() / x.abs().max()).item())
    return max(gaps)


def test_equivariant_layers_are_the_papers_terms_one_after_the_other(rng):
    one = polynomial.Equivariant(BLOCKS, D, 1, IN).double()
    two = polynomial.Equivariant(BLOCKS, D, IN, OUT).double()
    for layer in (one, two):
        torch.nn.init.normal_(layer.whole.bias)
    x = [features(rng, 1) for _ in range(BLOCKS)]
    blocks, attention, ffn = first(one, x)
    wanted = [slow(one, l, part) for l, part in enumerate(x)]
    second, ffn2 = two(attention, ffn)
    for l in range(BLOCKS):
        found = attention.factors(blocks)[l] | dict(
            zip(ffn._fields, (p[l] for p in ffn), strict=True)
        )
        assert compared(found, wanted[l]) < 1e-12
        again = slow(two, l, [wanted[l][name] for name in NAMES])
        found = second.factors(blocks)[l] | dict(
            zip(ffn._fields, (p[l] for p in ffn2), strict=True)
        )
        assert compared(found, again) < 1e-12
        seen, rows, columns = (p[l] for p in second.channels())
        S = torch.einsum("bfhpd,bfhqd->bfpq", again["query"], again["key"])
        R = torch.einsum("bfhpd,bfhdq->bfpq", again["value"], again["out"])
        assert (
            compared({"S": seen, "R": columns, "r": rows}, {"S": S, "R": R, "r": R.sum(3)}) < 1e-12
        )


def test_pooling_through_zeros_and_ones_is_pooling_a_relu(rng):
    one = polynomial.Equivariant(BLOCKS, D, 1, IN).double()
    two = polynomial.Equivariant(BLOCKS, D, IN, OUT).double()
    x = [features(rng, 1) for _ in range(BLOCKS)]
    blocks, attention, ffn = first(one, x)
    start = products(blocks), feedforward(blocks)
    for layer, state in ((one, start), (two, (attention, ffn.relu()))):
        explicit = shared(layer(*state)[1].relu())
        pooled = layer.pooled(*state)
        assert torch.allclose(pooled, explicit, rtol=1e-12, atol=1e-12)
        weights = list(layer.parameters()) + ([] if layer is one else list(one.parameters()))
        options = {"retain_graph": True, "allow_unused": True}
        ours = torch.autograd.grad(pooled.pow(2).sum(), weights, **options)
        other = torch.autograd.grad(explicit.pow(2).sum(), weights, **options)
        for a, b in zip(ours, other, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def test_invariant_layer_is_the_papers_sum(rng):
    one = polynomial.Equivariant(BLOCKS, D, 1, IN).double()
    last = polynomial.Invariant(BLOCKS, D, IN, OUT).double()
    torch.nn.init.normal_(last.ffn.bias)
    x = [features(rng, 1) for _ in range(BLOCKS)]
    _, attention, ffn = first(one, x)
    found = last(attention, shared(ffn))
    for l in range(BLOCKS):
        new = slow(one, l, x[l])
        S = torch.einsum("bfhpd,bfhqd->bfpq", new["query"], new["key"])
        R = torch.einsum("bfhpd,bfhdq->bfpq", new["value"], new["out"])
        phi = last.ffn.weight[l].T.split([IN, IN * D, IN, IN * D], dim=1)
        wanted = (
            torch.einsum("bfpq,fpeq->be", S, last.scores[l])
            + torch.einsum("bfpq,fpe->be", R, last.values[l])
            + torch.einsum("bfpq,ef->be", new["up"], phi[0])
            + torch.einsum("bfpq,efq->be", new["down"], phi[1].unflatten(1, (IN, D)))
            + torch.einsum("bfq,ef->be", new["up_bias"], phi[2])
            + torch.einsum("bfq,efq->be", new["down_bias"], phi[3].unflatten(1, (IN, D)))
            + last.ffn.bias[l]
        )
        assert torch.allclose(found[l], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("c_in", "c_out"), [(1, 10), (3, 4)])
def test_layers_have_as_many_parameters_as_the_papers(c_in, c_out):
    layer = polynomial.Equivariant(1, 32, c_in, c_out)
    terms = c_in * c_out * (2 * 32**3 + 12 * 32**2 + 15 * 32 + 12) + c_out * (2 + 2 * 32)
    assert sum(p.numel() for p in layer.parameters()) == terms
    last = polynomial.Invariant(1, 32, c_in, c_out)
    assert sum(p.numel() for p in last.parameters()) == c_in * c_out * (32**2 + 3 * 32 + 2) + c_out


def test_a_term_at_the_wrong_place_is_found(rng):
    """The control of the comparison above: two terms of W_A change places."""
    layer = polynomial.Equivariant(BLOCKS, D, 1, IN).double()
    x = [features(rng, 1) for _ in range(BLOCKS)]
    wanted = slow(layer, 0, x[0])
    with torch.no_grad():
        layer.input.weight.copy_(layer.input.weight.flip(1))
    _, _, ffn = first(layer, x)
    assert compared({"up": ffn.up[0]}, {"up": wanted["up"]}) > 1e-2


def test_published_init_has_the_codes_spread():
    """Fans of the released code at D 32, 2 heads of 16, 64 neurons (notes to the paper)."""
    torch.manual_seed(0)
    layer, last = polynomial.Equivariant(2, 32, 1, 10), polynomial.Invariant(2, 32, 10, 10)
    for part in (layer, last):
        published_init.draw(part, published_init.Sizes(2, 16, 16, 64))
    product = 2 * 32 * 32 + 1
    assert layer.whole.weight[:, :1024, 20:340].std().item() == pytest.approx(
        2 / (2 * product), rel=0.02
    )
    biases = (1 + 64) + (32 + 1) + 320
    assert layer.neuron.weight[:, -1, 20:].std().item() == pytest.approx(
        (2 / biases) ** 0.5, rel=0.1
    )
    assert layer.maps[0].std().item() == pytest.approx((2 / (16 + 64)) ** 0.5, rel=0.02)
    assert last.scores.std().item() == pytest.approx(2 / (2 * (20 * 1024 + 1)), rel=0.02)
    assert last.ffn.weight[:, -320:].std().item() == pytest.approx(
        (2 / (640 + 1 + 2 + 10)) ** 0.5, rel=0.1
    )


def test_low_rank_holds_a_factorised_phi(rng):
    """Its probes are <b c^T, S>, its columns phi R, with S and R never formed."""
    space = block_kit.space(queries=3)
    heads = space.read(block_kit.draw(space, 2, rng))
    full, thin = products(heads), low_rank.products(heads)
    left, right = torch.randn(2, 2, 6, D, generator=rng, dtype=torch.float64)
    wanted = torch.einsum("lrp,lbpq,lrq->lbr", left, full.scores, right)
    assert torch.allclose(thin.scored(left, right), wanted, rtol=1e-12, atol=1e-12)
    assert torch.allclose(thin.rows(), full.values.sum(3), rtol=1e-12, atol=1e-12)
    columns = torch.einsum("lnp,lbpj->lbjn", left, full.values)
    assert torch.allclose(thin.columns(left), columns, rtol=1e-12, atol=1e-12)


def test_low_rank_reads_width_768():
    """Two blocks of GPT-2's width: a full layer would hold 9e8 numbers a block."""
    layer = low_rank.Equivariant(2, 768, 1, 2, rank=8)
    assert sum(p.numel() for p in layer.parameters()) < 2e5
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(1, *shape, generator=rng) * 0.02

    block = {
        "query": normal(12, 1, 768, 64),
        "key": normal(12, 768, 64),
        "value": normal(12, 768, 64),
        "out": normal(12, 1, 64, 768),
        "up": normal(768, 256),
        "down": normal(256, 768),
    }
    attention, ffn = low_rank.products([block] * 2), feedforward([block] * 2)
    answer = low_rank.Invariant(2, 768, 2, 3, rank=8)(attention, layer.pooled(attention, ffn))
    answer.sum().backward()
    assert answer.shape == (2, 1, 3)
    assert layer.probes.left.grad.abs().max() > 0


def test_unit_layers_give_terms_of_like_size(rng):
    """What attention adds is not drowned: the reason for `unit`."""
    spaces = block_kit.space()
    blocks = spaces.read(block_kit.draw(spaces, 200, rng))
    tiny = [{k: v * (1e-3 if k in ("query", "out") else 1) for k, v in b.items()} for b in blocks]
    layer = polynomial.Equivariant(2, D, 1, IN, unit=True).double()
    attention, ffn = products(tiny), feedforward(tiny)
    layer.fit(attention, ffn)
    silent = Attention(torch.zeros_like(attention.scores), torch.zeros_like(attention.values))
    with torch.no_grad():
        moved = layer(attention, ffn)[1].down_bias - layer(silent, ffn)[1].down_bias
        assert 0.2 < moved.std(dim=1).mean() < 2
        plain = polynomial.Equivariant(2, D, 1, IN).double()
        moved = plain(attention, ffn)[1].down_bias - plain(silent, ffn)[1].down_bias
        assert moved.std(dim=1).mean() < 0.05


def test_relu_of_features_is_of_every_part(rng):
    x = Feedforward(*(torch.randn(2, 2, generator=rng) for _ in range(4)))
    assert all((y >= 0).all() and (y > 0).any() for y in x.relu())
