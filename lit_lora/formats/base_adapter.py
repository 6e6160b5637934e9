"""An adapter that is merged into a base before another one is trained on it."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_lora.adapters.same_config import function_fields
from lit_lora.argument_types import check_types
from lit_lora.errors import UserError
from lit_lora.families import ModelFamily
from lit_lora.formats.base import AdapterFiles
from lit_lora.formats.find import open_adapter, read_adapter
from lit_lora.formats.model_spec import data_hash
from lit_lora.formats.quantized_base import quantized_base, twice
from lit_lora.formats.text_encoders import for_class


@dataclass(frozen=True)
class BaseAdapter:
    """An adapter that is merged into the base while it is loaded, so that another one is trained over it.

    The weights become ``W + weight * dW`` before they are quantized. The new adapter's files hold the new adapter alone; load
    both with their weights, as the model card says.

    Args:
        path: File or folder of the adapter, LoRA, DoRA, LoHa or LoKr, as this project, PEFT, diffusers, kohya's scripts, ComfyUI
            or LyCORIS write it.
        weight: Factor of its update, as of ``set_adapters`` in diffusers; defaults to 1.
        drop_text_encoders: Whether to leave out those parts of the adapter that change text encoders. Defaults to False.

    Raises:
        UserError: If there is no path, or the weight is 0 or not finite.
    """

    path: str
    weight: float = 1.0
    drop_text_encoders: bool = False

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        if not self.path:
            raise UserError("base_adapters: an entry has no path; name the file or folder of an adapter")
        if not math.isfinite(self.weight) or self.weight == 0:
            raise UserError(
                f"base_adapters: weight={self.weight} of {self.path} is no factor; give a number such as 0.8"
            )

    def parts(self, family: type[ModelFamily]) -> dict[str, AdapterFiles]:
        """The adapter's parts by their names in the pipeline.

        Args:
            family: Model family of the base.

        Raises:
            UserError: If there is no complete adapter at the path, it belongs to another family, it has new tokens, or it changes
                text encoders that the family does not have.
        """
        return self.parts_of(self.read(family), family)

    def read(self, family: type[ModelFamily]) -> AdapterFiles:
        """The adapter's files.

        Args:
            family: Model family of the base.

        Raises:
            UserError: If there is no complete adapter at the path, or it belongs to another family or to a quantized base.
        """
        adapter = read_adapter(self.path, family)
        if quantization := quantized_base(adapter.metadata):
            raise UserError(f"base_adapters: {twice(self.path, quantization)}")
        return adapter

    def parts_of(self, adapter: AdapterFiles, family: type[ModelFamily]) -> dict[str, AdapterFiles]:
        """The parts of the adapter's files by their names in the pipeline: see :meth:`parts`."""
        if adapter.new_tokens and not self.drop_text_encoders:
            raise UserError(
                f"the adapter {self.path} has new tokens ({', '.join(adapter.new_tokens)}), which cannot be merged into a base; "
                f"set drop_text_encoders of base_adapters to true to use it without them and without text encoders"
            )
        parts = {family.denoiser_name: adapter} if adapter.state else {}
        for name, part in adapter.text_encoders.items():
            if self.drop_text_encoders:
                continue
            if name not in family.encoder_classes:
                raise UserError(
                    f"the adapter {self.path} changes {name}, which {family.__name__} does not have; set drop_text_encoders of "
                    f"base_adapters to true to use it without that part"
                )
            parts[name] = for_class(part, family.encoder_classes[name])
        if not parts:
            raise UserError(
                f"the adapter {self.path} has no part for the denoiser, and drop_text_encoders leaves nothing of it; leave it "
                f"out of base_adapters, or set drop_text_encoders to false"
            )
        return parts

    def record_of(self, adapter: AdapterFiles) -> dict[str, Any]:
        """What files say about this adapter: see :data:`lit_lora.formats.base_records.Records`.

        Args:
            adapter: The adapter's files, as :meth:`read` gives them.

        Raises:
            UserError: If there is no adapter at the path.
        """
        found, file = open_adapter(self.path)
        files = [file.path] if self.drop_text_encoders else found.files(file.path)
        digest = data_hash(*files)["sshs_model_hash"]
        parts = {"denoiser": adapter} if self.drop_text_encoders else adapter.parts
        settings = {name: function_fields(part.config) for name, part in parts.items()}
        record: dict[str, Any] = {
            "name": Path(self.path).name,
            "path": self.path,
            "sha256": digest,
            # Another alpha gives other weights, and most formats do not store it among the tensors.
            "settings": hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12],
            "weight": float(self.weight),
        }
        return record | ({"drop_text_encoders": True} if self.drop_text_encoders else {})
