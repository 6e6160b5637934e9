"""Imports the libraries without looking for garbage meanwhile, which takes a quarter of the time: nothing of them is garbage."""

from __future__ import annotations

import gc
from importlib import import_module

LIBRARIES = (
    *("lit_lora.lightning_cli", "lit_lora.families", "lit_lora.datamodules.webdataset_datamodule"),
    *("s3fs", "torch.utils.tensorboard"),  # Lightning imports them with the first checkpoint or logger
)

gc.disable()
for name in LIBRARIES:
    import_module(name)
gc.freeze()
gc.enable()
