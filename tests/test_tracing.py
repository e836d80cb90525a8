"""A module's weight space is right where the function that it says equals the module's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qemcli import recognition
from qemcli.errors import UnsupportedError
from qemcli.functions import respond


class Net(nn.Module):
    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def siren(net, x):
    h = torch.sin(30.0 * net.a(x))
    h = torch.sin(30.0 * net.b(h))
    return net.c(h) + 0.5


def pooled(net, x):
    x = F.max_pool2d(F.relu(net.a(x)), 2)
    x = F.max_pool2d(F.relu(net.b(x)), 2)
    return net.c(x.mean(dim=(2, 3)))


def viewed(net, x):
    x = torch.tanh(net.a(x))
    x = net.b(x).tanh()
    return net.c(x.view(x.size(0), -1))


LINE = (nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2))
CASES = {
    "mlp": (nn.Sequential(LINE[0], nn.Tanh(), LINE[1], nn.Tanh(), LINE[2]), (3,)),
    "no bias": (nn.Sequential(nn.Linear(3, 5, bias=False), nn.GELU(), nn.Linear(5, 2)), (3,)),
    "siren": (Net(siren, a=nn.Linear(2, 5), b=nn.Linear(5, 4), c=nn.Linear(4, 1)), (2,)),
    "strided cnn": (
        nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2), nn.ReLU(),
            nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
        ),
        (1, 14, 14),
    ),
    "max pooling": (
        Net(
            pooled, a=nn.Conv2d(2, 4, 3, padding=1), b=nn.Conv2d(4, 5, 3, padding=1),
            c=nn.Linear(5, 3),
        ),
        (2, 12, 12),
    ),
    "average pooling": (
        nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4 * 9, 6),
            nn.ELU(), nn.Linear(6, 2),
        ),
        (1, 8, 8),
    ),
    "flatten by view": (
        Net(viewed, a=nn.Conv2d(1, 4, 3), b=nn.Conv2d(4, 5, (3, 3)), c=nn.Linear(5 * 9, 3)),
        (1, 7, 7),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_traced_space_computes_the_module(name):
    module, shape = CASES[name]
    torch.manual_seed(0)
    module = module.double().eval()
    space = recognition.of(module)
    w = {n: p.detach()[None] for n, p in module.named_parameters()}
    x = torch.randn(6, *shape, dtype=torch.float64)
    assert space.forward.known
    torch.testing.assert_close(respond(space, w, x)[0], module(x).detach(), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["siren", "strided cnn", "max pooling"])
def test_another_way_of_running_is_another_function(name):
    module, shape = CASES[name]
    module = module.double().eval()
    right = recognition.of(module)
    other = {"siren": {"w0": 7.0}, "strided cnn": {"padding": 1}, "max pooling": {"padding": 2}}
    wrong = right.running(**other[name])
    w = {n: p.detach()[None] for n, p in module.named_parameters()}
    x = torch.randn(6, *shape, dtype=torch.float64)
    assert (respond(wrong, w, x)[0] - module(x)).abs().max() > 1e-4


REFUSED = {
    "branch": Net(lambda n, x: n.b(x + n.a(x)), a=nn.Linear(3, 3), b=nn.Linear(3, 2)),
    "groups": nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1)),
    "LayerNorm": nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2)),
    "twice": Net(lambda n, x: n.a(n.a(x).relu()), a=nn.Linear(3, 3)),
    "same way": nn.Sequential(LINE[0], nn.ReLU(), LINE[1], nn.Tanh(), LINE[2]),
    "Softmax": nn.Sequential(nn.Linear(3, 4), nn.Softmax(1)),
    "settings": nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.2), nn.Linear(4, 2)),
    "more than one input": nn.Bilinear(3, 4, 2),
    "traced": Net(lambda n, x: n.a(x) if x.sum() > 0 else x, a=nn.Linear(3, 2)),
    "average": nn.Sequential(nn.Conv2d(1, 2, 3), nn.AvgPool2d(2), nn.Tanh(), nn.Conv2d(2, 2, 1)),
    "after the last": nn.Sequential(nn.Linear(3, 4), nn.ReLU()),
    "neither": nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Linear(2, 2)),
}


@pytest.mark.parametrize("word", REFUSED)
def test_module_that_is_no_chain_is_refused(word):
    with pytest.raises(UnsupportedError, match=word):
        recognition.of(REFUSED[word])
