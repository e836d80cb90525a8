"""qem: read neural networks by their weights."""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "WeightSpace": "qemcli.spaces",
    "Zoo": "qemcli.zoos.zoo",
    "Predictor": "qemcli.predictors",
    "QemError": "qemcli.errors",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:  # PEP 562: nothing heavy is imported until it is asked for
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name == "__version__":
        return _version()
    raise AttributeError(f"module 'qemcli' has no attribute '{name}'")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("qemcli")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"
