"""What a datamodule says about the batches of a run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule

from lit_lora.errors import UserError


def image_size(data: Any, resolution: int | None = None) -> tuple[int, int]:
    """Height and width of the largest images of a run, in pixels.

    Args:
        data: The run's datamodule, or None.
        resolution: Edge of a square image in pixels; by default the datamodule's.

    Raises:
        UserError: If neither says it.
    """
    edge = resolution or data_option(data, "resolution")
    buckets = getattr(data, "buckets", None)
    if buckets is None:
        return edge, edge
    height, width = max(buckets.sizes(edge).tolist(), key=lambda size: size[0] * size[1])
    return int(height), int(width)


def data_option(data: Any, name: str) -> int:
    """A number that a datamodule has as an attribute.

    Args:
        data: The run's datamodule, or None.
        name: Name of the attribute, such as ``batch_size``.

    Raises:
        UserError: If there is no datamodule, or it has no such number.
    """
    value = getattr(data, name, None)
    if not isinstance(value, int):
        who = "there is no datamodule that says" if data is None else f"{type(data).__name__} does not say"
        raise UserError(
            f"the memory of the run cannot be planned, since {who} its {name}: use one that does, leave MemoryLimit out, or "
            f"call lit-lora plan with --{name} N"
        )
    return value


def has_validation(data: Any) -> bool:
    """Whether a datamodule has validation data."""
    if hasattr(data, "val_samples"):
        return bool(data.val_shards or data.val_samples)
    return hasattr(data, "val_dataloader") and type(data).val_dataloader is not LightningDataModule.val_dataloader
