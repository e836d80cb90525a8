"""Recognition: the weight space of a state dict, whatever its tensors are called.

What has no place is named with its reason; what has a symmetry of another kind is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qemcli import registry
from qemcli.errors import InputError, UsageError
from qemcli.families._recognition import recognise
from qemcli.ordering import Shape, Shapes, in_order, paired, unsupported
from qemcli.spaces import ACTIVATIONS, CONVENTIONS, Chain, Forward, Layer, WeightSpace, chain

if TYPE_CHECKING:
    from torch import nn

OPTIMISER = "state of the optimiser or the run, not of the network"
SCALAR = "a single number, not weights"
DATA = "data that the network was fitted to, not weights"
FITTED = frozenset({"x", "y", "coef"})  # as the INRs of sine waves carry them beside their weights
_RUN = re.compile(
    r"(^|[./_])(optim|optimizers?|optimizer_state\w*|(lr_)?schedulers?|scaler|rng_state)s?([./]|$)"
    r"|exp_avg|momentum_buffer|(^|[./])callbacks[./]",
    re.IGNORECASE,
)
_FOREIGN = tuple(
    (re.compile(pattern, re.IGNORECASE), reason)
    for pattern, reason in (
        (r"running_(mean|var)|moving_(mean|variance)|num_batches",
         "batch normalisation that names do not put right behind a layer"),
        (r"lora_?[ab]\b|lora[._]?(down|up)", "a LoRA adapter"),
        (r"(^|[./])(down_?sample|shortcut|skip|res(idual|net|block)?s?)\d*([./_]|$)", "residual"),
        (r"(^|[./])(res|residual)_?(block|unit)s?\d*([./_]|$)", "residual connections"),
        (r"attn|attention|(^|[./_])(qkv|[qkv]_proj|query|key|value|in_proj_weight)([./]|$)",
         "attention"),
        (r"weight_(ih|hh)|bias_(ih|hh)|recurrent_kernel|(^|[./])(lstm|gru|rnn)\d*([./_]|$)",
         "a recurrent layer"),
        (r"embed|(^|[./])(wte|wpe|cls_token)([./]|$)", "an embedding"),
        (r"parametrizations|weight_[gv]$", "a reparametrised (weight- or spectral-norm) layer"),
        (r"qweight|qzeros|g_idx|absmax|quant_state", "quantised weights"),
        (r"(^|[./_0-9])(bn|batch_?norm\w*|layer_?norm\w*|norm|ln|gn|gamma|beta)\d*(:0)?([./_]|$)",
         "normalisation"),
    )
)  # fmt: skip
_KERNEL = re.compile(r"(^|[./_])(depthwise_)?kernel(:\d+)?$")
_ALIASES = {
    "leakyrelu": "leaky_relu", "sine": "sin", "linear": "identity", "swish": "silu", "none":
    "identity", "atan": "arctan", "logistic": "sigmoid", "relu()": "relu", "tanh()": "tanh",
}  # fmt: skip


def turns(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """How to transpose what Keras stores input-first: kernels (h, w, i, o) and (i, o) to torch's
    order."""
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}
    return {n: axes[len(s)] for n, s in shapes.items() if _KERNEL.search(n) and len(s) in (2, 4)}


def turned(shapes: Shapes) -> dict[str, Shape]:
    """The shapes in torch's layout."""
    by = turns(shapes)
    return {n: tuple(s[i] for i in by[n]) if n in by else tuple(s) for n, s in shapes.items()}


def activation_name(text: str) -> str | None:
    """A name of ACTIVATIONS for what people write (`ReLU`, `swish`), or None."""
    name = text.strip().lower().replace("nn.", "")
    name = _ALIASES.get(name, name)
    return name if name in ACTIVATIONS else None


def of(module: nn.Module, image: tuple[int, ...] | None = None) -> WeightSpace:
    """The weight space of a module, and how it is run, read from its graph; UnsupportedError that
    names what it does not understand. `image`: the (channels, height, width) that a CNN reads."""
    from qemcli.tracing import trace

    return trace(module, image)


def known_activation(stated: str) -> str:
    """What --activation states; UsageError with the nearest name for one that we do not know."""
    known = activation_name(stated)
    if known is None:
        raise UsageError(
            f"no activation is called '{stated}'", registry.suggest(stated, sorted(ACTIVATIONS))
        )
    return known


def infer(
    shapes: Shapes,
    metadata: Mapping[str, Any] | None = None,
    activation: str | None = None,
    ordered: bool = True,
    heads: int | None = None,
) -> WeightSpace:
    """The weight space of tensors in torch's layout.

    `metadata` may hold `qem.space` (then nothing is guessed), `activation`, `w0`, `offset`, and a
    transformer's config.json; `activation` stated by the caller goes before it, `heads` counts
    where config.json does not say them; `ordered` says whether the order of `shapes` is the
    network's. Raises UnsupportedError that names the tensor of an architecture we do not act on,
    InputError where no chain of layers fits or several do, UsageError for an unknown activation.
    """
    metadata = metadata or {}
    known = _activation(metadata, activation)
    if "qem.space" in metadata:
        return _declared(shapes, str(metadata["qem.space"]), known)
    left, skipped = weights(shapes)
    if not left:
        raise InputError("it holds no weights", "give a checkpoint with at least one layer")
    transformer = recognise(left, metadata, known, heads)
    if transformer is not None:
        return transformer.without(tuple(skipped.items()))
    _refuse_foreign(left)
    pairs = paired(left)
    names = in_order({w: left[w] for w in pairs}, ordered)
    return with_skipped(_build(left, pairs, names, metadata, known), tuple(skipped.items()))


def weights(shapes: Shapes) -> tuple[dict[str, Shape], dict[str, str]]:
    """(what can be weights by its name and shape, reason for every other tensor)."""
    skipped = {n: reason for n, s in shapes.items() if (reason := _passed_over(n, s))}
    skipped |= {n: DATA for n in FITTED & set(shapes) if set(shapes) - FITTED - set(skipped)}
    return {n: tuple(s) for n, s in shapes.items() if n not in skipped}, skipped


def with_skipped(space: WeightSpace, skipped: tuple[tuple[str, str], ...]) -> WeightSpace:
    """The same space, with more tensors named as left out."""
    return space.without(skipped)


def _activation(metadata: Mapping[str, Any], stated: str | None) -> str | None:
    if stated is None:
        found = metadata.get("activation", metadata.get("config.activation"))
        return activation_name(found) if isinstance(found, str) else None
    return known_activation(stated)


def _declared(shapes: Shapes, text: str, activation: str | None) -> WeightSpace:
    """The space that the file states of itself, checked against its tensors."""
    space = WeightSpace.from_json(text)
    for name, shape in space.shapes.items():
        if tuple(shapes.get(name, ())) != tuple(shape):
            raise InputError(
                f"'qem.space' says tensor '{name}' is {shape}, the file has {shapes.get(name)}"
            )
    extra = tuple((n, "not named in 'qem.space'") for n in shapes if n not in space.shapes)
    return with_skipped(space.running(activation), extra)


def _passed_over(name: str, shape: Shape) -> str | None:
    if _RUN.search(name):
        return OPTIMISER
    if math.prod(shape) == 0:
        return "an empty tensor"
    return SCALAR if shape == () else None


def _refuse_foreign(shapes: Shapes) -> None:
    for name, shape in shapes.items():
        for pattern, reason in _FOREIGN:
            if pattern.search(name):
                reason = "residual connections" if reason == "residual" else reason
                raise unsupported(name, reason)
        if len(shape) not in (1, 2, 4):
            kind = {3: "a 1-d convolution", 5: "a 3-d convolution"}.get(len(shape), "no layer")
            raise unsupported(name, f"{kind} (shape {shape})")
    scales = [n for n, s in shapes.items() if len(s) == 1 and re.search(r"weight$|scale$", n)]
    if scales:
        raise unsupported(scales[0], "normalisation (a weight of one dimension)")


def _build(
    shapes: Shapes,
    pairs: Mapping[str, str | None],
    order: Sequence[str],
    metadata: Mapping[str, Any],
    activation: str | None,
) -> WeightSpace:
    layers, kernels, junction = [], {}, "none"
    for i, name in enumerate(order):
        rows, cols, *kernel = shapes[name]
        taps = math.prod(kernel)
        if kernel:
            kernels[name] = (kernel[0], kernel[1])
        elif i and len(shapes[order[i - 1]]) == 4:
            taps = cols // shapes[order[i - 1]][0]
            junction = "flatten" if taps > 1 else "pool"
            if taps > 1 and _KERNEL.search(name):
                raise unsupported(name, "a flatten of channels-last positions (Keras)")
        layers.append(
            Layer(name, pairs[name], rows, cols // (1 if kernel else taps), taps, bool(kernel))
        )
    family = "cnn" if kernels else "mlp"
    forward = Forward(padding=_padding(kernels), junction=junction, image=_image(layers, kernels))
    w0, offset = _number(metadata, "w0", "omega_0"), _number(metadata, "offset")
    if family == "mlp" and (w0 is not None or activation == "sin"):
        family, activation = "siren", activation or "sin"
        stated = {"axes": "", "offset": offset or 0.0, **CONVENTIONS.get(_said(metadata), {})}
        forward = Forward(w0=30.0 if w0 is None else w0, known=w0 is not None, **stated)
    return chain(layers, family, kernels, activation, forward)


def _said(metadata: Mapping[str, Any]) -> str:
    """The convention that the file states, or an empty text."""
    return str(metadata.get("convention", metadata.get("config.convention", "")))


def stated(space: WeightSpace, w0: float | None, convention: str | None) -> WeightSpace:
    """The space with what the caller says of how its SIRENs are run, before what the file says.

    Unchanged where nothing is said or w0 stays unknown, and for what can be no SIREN
    (convolutions, another activation). UsageError for an unknown convention.
    """
    if convention is not None and convention not in CONVENTIONS:
        raise UsageError(
            f"no convention is called '{convention}'", f"known: {', '.join(CONVENTIONS)}"
        )
    if not isinstance(space, Chain):
        return space
    run = space.forward if space.family == "siren" else Forward(axes="")
    unknown = w0 is None and (convention is None or not run.known)
    if unknown or space.family == "cnn" or space.activation not in (None, "sin"):
        return space
    said = CONVENTIONS.get(convention or "", {})
    forward = replace(run, w0=run.w0 if w0 is None else w0, known=True, **said)
    return replace(space, family="siren", activation="sin", forward=forward)


def _padding(kernels: Mapping[str, tuple[int, int]]) -> int:
    return max((side // 2 for kernel in kernels.values() for side in kernel), default=0)


def _image(layers: Sequence[Layer], kernels: Mapping[str, tuple[int, int]]) -> Shape | None:
    """The square image whose positions the first dense layer reads, where every convolution keeps
    them."""
    positions = next((la.taps for la in layers if not la.conv), 1)
    side = math.isqrt(positions)
    sizes = {size for kernel in kernels.values() for size in kernel}
    keeps = len(sizes) == 1 and sizes.pop() % 2 == 1
    if positions == 1 or side * side != positions or not keeps:
        return None
    return layers[0].cols, side, side


def _number(metadata: Mapping[str, Any], *names: str) -> float | None:
    for name in names:
        try:
            value = json.loads(str(metadata[name]))
        except (KeyError, ValueError):
            continue
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    return None
