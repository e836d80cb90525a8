"""Checkpoint directories run by the library that they come from, Hugging Face's transformers.

It is an extra, imported on use; nothing is downloaded and no code of a checkpoint is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qemcli.errors import EnvironmentFailure, InputError

BATCH = 3
TOKENS = 12  # of a probe, or as many as the model has positions for
CONFIG = "config.json"


@dataclass(frozen=True)
class Library:
    """A checkpoint directory and the class of the library that runs it."""

    folder: Path
    config: Any
    kind: Any

    @classmethod
    def of(cls, folder: Path) -> Library:
        """Read config.json; EnvironmentFailure where the library is not installed, InputError where
        it does not know these networks."""
        from huggingface_hub.errors import StrictDataclassError

        module = _imported()
        try:
            config = module.AutoConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, StrictDataclassError) as error:
            raise InputError(f"{folder / CONFIG}: {_line(error)}") from None
        stated = config.architectures
        named = stated[0] if isinstance(stated, list) and stated else ""
        kind = getattr(module, named, None) if isinstance(named, str) else None
        if not (isinstance(kind, type) and hasattr(kind, "from_pretrained")):
            raise InputError(
                f"{folder / CONFIG}: transformers {module.__version__} has no class {named!r}",
                "`architectures` names the class that the checkpoint was saved from",
            )
        return cls(folder, config, kind)

    def model(self, dtype: torch.dtype, state: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The model as it lies in the folder, or with other tensors under the file's names.

        Raises InputError where tensors are missing: what the library fills in is random.
        """
        where = None if state is not None else self.folder
        try:
            model, found = self.kind.from_pretrained(
                where,
                config=self.config,
                state_dict=None if state is None else dict(state),
                dtype=dtype,
                attn_implementation="eager",
                output_loading_info=True,
                local_files_only=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise InputError(
                f"{self.folder}: transformers cannot load it: {_line(error)}"
            ) from None
        missing = sorted(found["missing_keys"]) + sorted(map(str, found["mismatched_keys"]))
        if missing:
            raise InputError(
                f"{self.folder}: the file has no tensor '{missing[0]}', which "
                f"{self.kind.__name__} would draw at random ({len(missing)} in all)"
            )
        return model.eval()

    def inputs(self, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
        """Random tokens, or pictures of normal numbers: a batch of BATCH."""
        config = self.config
        if self.kind.main_input_name == "pixel_values":
            sides = config.image_size
            height, width = sides if isinstance(sides, list | tuple) else (sides, sides)
            shape = (BATCH, config.num_channels, height, width)
            return {"pixel_values": torch.randn(shape, generator=generator, dtype=dtype)}
        length = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
        tokens = torch.randint(config.vocab_size, (BATCH, length), generator=generator)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class _Wide(TorchFunctionMode):
    """float64 throughout: the library computes norms and softmax in float32 whatever the model's
    dtype, and an error below 1e-7 would not be seen."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.dtype is torch.float64:
            if func is Tensor.float:
                return first
            args = tuple(_widened(x) for x in args)
            kwargs = {name: _widened(x) for name, x in kwargs.items()}
        return func(*args, **kwargs)


def _widened(x: Any) -> Any:
    return torch.float64 if x is torch.float32 else x


def answers(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """(b, numbers): every answer that the model gives, logits or hidden states; a model in float64
    computes in nothing less."""
    wide = next(model.parameters()).dtype is torch.float64
    with torch.no_grad(), _Wide() if wide else nullcontext():
        found = model(**inputs, return_dict=True)
    return torch.cat([x.flatten(1) for x in _tensors(found)], dim=1)


def _tensors(found: Mapping[str, Any]) -> Iterator[Tensor]:
    """The answers among what a model returns, without its cache."""
    for value in found.values():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
            yield value


def _imported() -> Any:
    """The library, silent: it reports by exceptions and by what it returns."""
    try:
        import transformers
    except ImportError:
        raise EnvironmentFailure(
            "running a checkpoint directory needs the library transformers",
            "pip install 'qemcli[transformers]'",
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
