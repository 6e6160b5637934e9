"""Adapter training for diffusion models as PyTorch Lightning parts.

The public names are listed in ``__init__.pyi``.
"""

from lit_lora.lazy import lazy_names, public_names

__version__ = "0.1.0"

__all__ = list(public_names())

__getattr__ = lazy_names(__name__, public_names())


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
