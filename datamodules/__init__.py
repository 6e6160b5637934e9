"""Training data from tar shards: packing, indexing, planning, decoding, loading, streaming."""

from lit_lora.lazy import lazy_names, public_names

__all__ = list(public_names(__name__))

__getattr__ = lazy_names(__name__, public_names(__name__))


def __dir__() -> list[str]:
    return __all__
