"""What tests of layers share: spaces of distinct widths, features, comparisons."""

import torch

from qemcli.layers.features import Features
from qemcli.spaces import Chain, cnn, mlp

SPACES = {
    "mlp3": mlp([2, 5, 7, 3]),
    "mlp2": mlp([2, 4, 3]),
    "mlp4": mlp([3, 5, 1, 4, 2]),
    "pool": cnn([2, 5, 4, 6], 3),
    "flatten": cnn([1, 5, 4], 3, kernel=2, positions=3),
}


def draw_features(space: Chain, channels: int, batch: int = 3, seed: int = 0) -> Features:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    return [
        (normal(batch, la.rows, la.cols, la.taps * channels), normal(batch, la.rows, channels))
        for la in space.layers
    ]


def draw_weights(space: Chain, batch: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    return space.unflatten(torch.randn(batch, space.size, generator=rng, dtype=torch.float64) * 0.5)


def largest(features: Features, others: Features) -> float:
    """The largest difference over the size of the second, tensor by tensor."""
    gaps = []
    for pair, other in zip(features, others, strict=True):
        for x, y in zip(pair, other, strict=True):
            assert x.shape == y.shape
            gaps.append(((x - y).abs().max() / (1e-300 + y.abs().max())).item())
    return max(gaps)


def randomise(module: torch.nn.Module, seed: int = 0, size: float = 1.0) -> torch.nn.Module:
    """Every parameter drawn anew, so that nothing is nearly constant as it is at the start."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            spread = size / max(1, p.shape[-1] if p.dim() > 1 else 1) ** 0.5
            p.copy_(torch.randn(p.shape, generator=rng, dtype=p.dtype) * spread)
    return module


def span(make, space: Chain, draws: int) -> int:
    """The rank of the layer's linear part over random parameters (one channel, float64)."""
    features = [(torch.zeros_like(w), torch.zeros_like(b)) for w, b in draw_features(space, 1, 1)]
    sizes = [x.numel() for pair in features for x in pair]
    shapes = [x.shape[1:] for pair in features for x in pair]
    basis = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, dim=1)
    parts = [p.reshape(-1, *shape) for p, shape in zip(basis, shapes, strict=True)]
    batch = list(zip(parts[::2], parts[1::2], strict=True))
    layer = make(space).double()
    rows = []
    for seed in range(draws):
        randomise(layer, seed)
        with torch.no_grad():
            zero, full = layer(features), layer(batch)
        out = [(w - z, b - y) for (w, b), (z, y) in zip(full, zero, strict=True)]
        rows.append(torch.cat([x.flatten(1) for pair in out for x in pair], dim=1).flatten())
    return int(torch.linalg.matrix_rank(torch.stack(rows), rtol=1e-9).item())
