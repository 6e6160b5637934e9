"""Reads from a datamodule the options that the memory of a run depends on."""

from __future__ import annotations

from typing import Any

from lit_lora.errors import UserError


def image_size(data: Any, resolution: int | None = None) -> tuple[int, int]:
    """Height and width of the largest images of a run, in pixels.

    Args:
        data: Datamodule of the run, or None.
        resolution: Edge of a square image in pixels; defaults to the datamodule's.

    Raises:
        UserError: If there is neither a resolution nor a datamodule with one.
    """
    edge = resolution or data_option(data, "resolution")
    buckets = getattr(data, "buckets", None)
    if buckets is None:
        return edge, edge
    height, width = max(buckets.sizes(edge).tolist(), key=lambda size: size[0] * size[1])
    return int(height), int(width)


def data_option(data: Any, name: str) -> int:
    """An integer attribute of a datamodule.

    Args:
        data: Datamodule of the run, or None.
        name: Name of the attribute, such as ``batch_size``.

    Raises:
        UserError: If there is no datamodule, or it has no such integer.
    """
    value = getattr(data, name, None)
    if not isinstance(value, int):
        reason = "there is no datamodule" if data is None else f"{type(data).__name__} has no attribute {name}"
        raise UserError(
            f"the memory of the run cannot be planned, since {reason}: use a datamodule with an integer {name}, remove "
            f"MemoryLimit, or call lit-lora plan with --{name} N"
        )
    return value


def cacheable(data: Any) -> dict[str, Any]:
    """What ``lit-lora cache`` could encode, as the arguments ``cacheable`` and ``cache_keys`` of a run.

    Args:
        data: Datamodule of the run, or None.
    """
    kinds = frozenset(getattr(data, "cacheable", ()))
    crops = kinds and not all(decoder.center_crop for decoder in data.decoders)
    return {"cacheable": kinds, "cache_keys": {"data.init_args.decoder.center_crop": True} if crops else {}}
