"""config.json of the transformers library: what it says of a network, and what is refused by it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qemcli.errors import InputError, UnsupportedError
from qemcli.families._family import Family
from qemcli.spaces import ACTIVATIONS

CONFIG = "hf.config"  # the key of a checkpoint's metadata under which its config.json stands
HEADS = ("heads", "n_heads", "num_attention_heads", "config.heads", "config.n_attention_heads")
_ALIBI = "ALiBi: its heads have fixed slopes and are not acted on"
_QK_NORM = "normalised queries and keys, which have another symmetry"
_EXPERTS = "a mixture of experts"
_RELATIVE = "relative position biases shared by all blocks"
_MAMBA = "no attention in some or all blocks"
REFUSED = {  # model_type -> what qem does not act on
    "t5": _RELATIVE, "mt5": _RELATIVE, "umt5": _RELATIVE, "longt5": _RELATIVE,
    "bloom": _ALIBI, "mpt": _ALIBI,
    "qwen3": _QK_NORM, "gemma3": _QK_NORM, "gemma3_text": _QK_NORM, "olmo2": _QK_NORM,
    "cohere": _QK_NORM, "chameleon": _QK_NORM,
    "mixtral": _EXPERTS, "qwen2_moe": _EXPERTS, "qwen3_moe": _EXPERTS, "olmoe": _EXPERTS,
    "deepseek_v2": _EXPERTS, "deepseek_v3": _EXPERTS, "gpt_oss": _EXPERTS,
    "mamba": _MAMBA, "mamba2": _MAMBA, "jamba": _MAMBA, "rwkv": _MAMBA,
    "gemma": "RMSNorm with gains counted from one", "gemma2": "soft-capped logits",
}  # fmt: skip
_WORDS = {
    "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_python": "gelu", "gelu_pytorch_tanh": "gelu",
    "swish": "silu", "linear": "identity",
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """What config.json or the caller says of a network; empty where nobody does."""

    said: Mapping[str, Any]
    heads: int | None = None

    @property
    def kind(self) -> str | None:
        """model_type, where it is stated."""
        found = self.said.get("model_type")
        return found if isinstance(found, str) and found else None

    def number(self, key: str) -> int | None:
        """A size; None where it is not stated; InputError where it is not a whole number."""
        value = self.said.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"config.json: {key} is {value!r}, not a whole number")
        return value

    def share(self, default: float) -> float:
        """The share of a head that is rotated; `default` is the library's own."""
        rope = self.said.get("rope_parameters")
        places = (rope if isinstance(rope, Mapping) else {}, self.said)
        for place in places:
            for key in ("partial_rotary_factor", "rotary_pct"):
                value = place.get(key)
                if isinstance(value, int | float) and 0 <= value <= 1:
                    return float(value)
        return default

    def activation(self, family: Family) -> str | None:
        """A name of ACTIVATIONS, or None for one that qem does not know."""
        word = str(self.said.get(family.key("activation"), family.activation))
        name = _WORDS.get(word, word)
        return name if name in ACTIVATIONS else None


def read(metadata: Mapping[str, Any], heads: int | None) -> Config:
    """What stands in a checkpoint's metadata; `heads` counts where nothing else says them.

    Raises InputError where config.json is not a JSON object.
    """
    said: Any = {}
    if CONFIG in metadata:
        try:
            said = json.loads(str(metadata[CONFIG]))
        except (ValueError, RecursionError) as error:
            raise InputError(f"config.json is not JSON ({error})", "fetch it again") from None
        if not isinstance(said, dict):
            raise InputError("config.json is not a JSON object", "fetch it again")
    return Config(said, next((n for n in map(_count, _held(metadata)) if n), heads))


def _held(metadata: Mapping[str, Any]) -> list[Any]:
    return [metadata[key] for key in HEADS if key in metadata]


def _count(value: Any) -> int | None:
    text = str(value)
    return int(text) if text.isdecimal() and 0 < len(text) < 6 else None


def refuse(config: Config) -> None:
    """Raise UnsupportedError for a network whose config.json says that qem does not act on it."""
    said = config.said
    hint = "give a transformer of a family that qem knows"
    if config.kind in REFUSED:
        raise UnsupportedError(f"a {config.kind} network: {REFUSED[config.kind]}", hint)
    if said.get("alibi") is True:
        raise UnsupportedError(f"a {config.kind} network: {_ALIBI}", hint)
    if said.get("quantization_config"):
        raise UnsupportedError("its weights are quantised", "give the original")
    if said.get("add_cross_attention") is True:
        raise UnsupportedError(f"a {config.kind} network with cross-attention", hint)
    if said.get("position_embedding_type", "absolute") not in ("absolute", "rotary"):
        raise UnsupportedError(f"a {config.kind} network with {_RELATIVE}", hint)
