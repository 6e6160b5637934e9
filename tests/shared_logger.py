"""A logger whose runs have one ``save_dir``, as those of Weights & Biases and MLflow."""

from __future__ import annotations

import secrets
from typing import Any

from lightning.pytorch.loggers.logger import Logger


class SharedLogger(Logger):
    """The id of a run is made when it starts, on the first process alone."""

    def __init__(self, save_dir: str, project: str = "project") -> None:
        super().__init__()
        self._save_dir, self._name = save_dir, project
        self._version: str | None = None

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> str | None:
        return self._version

    @property
    def experiment(self) -> None:
        self._version = self._version or secrets.token_hex(4)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Nothing is kept."""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing is kept."""
