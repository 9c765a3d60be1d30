"""KV-cache compression for JAX: packed low-bit caches, attention over codes, lossless transport.

Submodules load on first use, so that importing jaxquant imports no JAX::

    from jaxquant import attention, cache, quantizers
    from jaxquant.codecs import qatc          # needs no JAX
"""

import importlib
import pkgutil
from types import ModuleType

__version__ = "0.1.0"

_SUBMODULES = frozenset(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_SUBMODULES | set(globals()))
