"""The config of a run, beside its checkpoints."""

from __future__ import annotations

import os
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from lit_lora.datamodules.remote.transfer import is_remote
from lit_lora.redact import redact
from lit_lora.run_folder import run_folder


class SaveConfig(SaveConfigCallback):
    """Saves the run's config in the run's folder, without the user names, passwords and queries of URLs."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **options: Any) -> None:
        super().__init__(parser, _redacted(config.clone()), **options, save_to_log_dir=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = run_folder(trainer)  # a collective call
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        get_filesystem(self._folder).makedirs(self._folder, exist_ok=True)
        path = os.path.join(self._folder, self.config_filename)
        options: dict[str, Any] = {"skip_none": False, "skip_validation": True, "multifile": self.multifile}
        self.parser.save(self.config, path, overwrite=True, **options)


def _redacted(value: Any) -> Any:
    if isinstance(value, Namespace | dict):
        for name in list(value.keys()):
            value[name] = _redacted(value[name])
    elif isinstance(value, list):
        return [_redacted(entry) for entry in value]
    elif isinstance(value, str) and is_remote(value):
        return redact(value)
    return value
