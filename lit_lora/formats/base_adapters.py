"""All adapters that are merged into a base."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lit_lora.errors import UserError
from lit_lora.families import ModelFamily
from lit_lora.formats.base_adapter import BaseAdapter
from lit_lora.formats.base_records import Records, base_records, same_adapters, told
from lit_lora.formats.find import read_adapter
from lit_lora.formats.merged_layers import MergedLayer, merged_layers
from lit_lora.quantization.weight_change import COARSE, Changes, Rounding, WeightChange


class BaseAdapters:
    """The changes of a base's weights by adapters that are merged into it.

    Each adapter's update is that of the base's own weights, as when diffusers has loaded them all, so that their order does not
    matter.

    Args:
        adapters: The adapters.
        family: Model family of the base.

    Raises:
        UserError: If an adapter cannot be read or merged, or belongs to another family.
    """

    def __init__(self, adapters: Sequence[BaseAdapter], family: type[ModelFamily]) -> None:
        self.family = family
        read = [one.read(family) for one in adapters]
        self.records: Records = [one.record_of(adapter) for one, adapter in zip(adapters, read, strict=True)]
        self._warn_of_doubles(adapters)
        self._rounding = Rounding()
        updates: dict[str, dict[str, list[MergedLayer]]] = {}
        for one, adapter in zip(adapters, read, strict=True):
            self._check_trained_over(one, base_records(adapter.metadata))
            for part, files in one.parts_of(adapter, family).items():
                for name, layer in merged_layers(files, one.path, one.weight).items():
                    updates.setdefault(part, {}).setdefault(f"{name}.weight", []).append(layer)
        self._changes: dict[str, Changes] = {
            part: {
                name: WeightChange(layers[0].path, _Sum(tuple(layers)), self._rounding)
                for name, layers in weights.items()
            }
            for part, weights in updates.items()
        }

    def _warn_of_doubles(self, adapters: Sequence[BaseAdapter]) -> None:
        """Warn of an adapter that comes twice, such as under two spellings of its path."""
        first: dict[str, BaseAdapter] = {}
        for one, record in zip(adapters, self.records, strict=True):
            other = first.setdefault(record["sha256"], one)
            if other is not one:
                warnings.warn(
                    f"base_adapters: {other.path} and {one.path} are the same adapter, whose weights {other.weight:g} and "
                    f"{one.weight:g} add up; name it once, unless that is meant",
                    stacklevel=3,
                )

    def _check_trained_over(self, one: BaseAdapter, over: Records) -> None:
        """Warn of an adapter that was trained over others than those beside it."""
        lacking = [record for record in over if not any(same_adapters([record], [other]) for other in self.records)]
        if lacking:
            warnings.warn(
                f"base_adapters: {one.path} was trained over {told(lacking)}; name these, too, unless they are merged into the "
                f"base already",
                stacklevel=3,
            )

    def changes(self, left_out: Collection[str] = ()) -> dict[str, Changes]:
        """The changes by the name of the part in the pipeline.

        Args:
            left_out: Parts of the family that are not loaded, because the datamodule reads their outputs from a cache.

        Raises:
            UserError: If text encoders are changed and cached text embeddings are read.
        """
        encoders = [name for name in self._changes if name != self.family.denoiser_name]
        if encoders and "text" in left_out:
            first = next(iter(self._changes[encoders[0]].values())).source
            raise UserError(
                f"base_adapters: {first} changes {encoders[0]}, and the cached text embeddings are those of the base alone; "
                f"train without cached text, or set drop_text_encoders of the adapter to true"
            )
        return self._changes

    def warn_of_rounding(self, dtype: torch.dtype, advice: str) -> None:
        """Warn if the dtype of the loaded weights has rounded much of the changes away.

        Args:
            dtype: dtype of the weights.
            advice: What to do.
        """
        if self._rounding.share > COARSE:
            names = " and ".join(one["name"] for one in self.records)
            warnings.warn(
                f"rounding the base to {str(dtype).removeprefix('torch.')} adds an error of {self._rounding.share:.0%} to the "
                f"change by {names}; {advice}",
                stacklevel=3,
            )

    def check(self, saved: Records) -> None:
        """Check that a checkpoint was trained over the same adapters.

        Args:
            saved: Records in the checkpoint.

        Raises:
            UserError: If they differ.
        """
        if not same_adapters(self.records, saved):
            raise UserError(
                f"the checkpoint was trained over {told(saved)}, and base_adapters names {told(self.records)}; resume with the "
                f"adapters of the checkpoint, or start without ckpt_path"
            )


def recorded_adapters(
    records: Records, path: object, places: Sequence[str] = (), family: type[ModelFamily] | None = None
) -> list[BaseAdapter]:
    """The adapters that an adapter was trained over.

    Args:
        records: Their records in the adapter's metadata.
        path: File of the adapter, for errors.
        places: Paths of the adapters in the same order; defaults to the paths of the training.
        family: Model family of the base; defaults to that which the files tell.

    Raises:
        UserError: If an adapter is not there, or is another one; if the numbers of paths and adapters differ.
    """
    if places and len(places) != len(records):
        raise UserError(f"{path} was trained over {told(records)}; give one path for each adapter, not {len(places)}")
    found = []
    for record, place in zip(records, places or [one["path"] for one in records], strict=True):
        needed = f"{path} was trained over {told([record])}"
        if not Path(place).exists():
            raise UserError(f"{needed}, which is not at {place}; give its path with --base_adapters")
        one = BaseAdapter(place, record["weight"], bool(record.get("drop_text_encoders")))
        here = one.record_of(read_adapter(place, family))
        if not same_adapters([here], [record]):
            raise UserError(f"{needed}, and {place} is {told([here])}; give its path with --base_adapters")
        found.append(one)
    return found


@dataclass(frozen=True)
class _Sum:
    """A weight with several updates of it."""

    layers: tuple[MergedLayer, ...]

    def __call__(self, weight: Tensor) -> Tensor:
        total = weight.clone()
        for layer in self.layers:
            total += layer.update(weight)
        return total
