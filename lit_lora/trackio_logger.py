"""Metrics and images of a run in trackio, for which Lightning has no logger."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.logger import _convert_params, _flatten_dict, _sanitize_params
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from lit_lora.argument_types import check_types
from lit_lora.errors import UserError


class TrackioLogger(Logger):
    """Logs to `trackio <https://github.com/gradio-app/trackio>`_: on this machine, or in a Hugging Face Space.

    ``trackio show`` opens the dashboard. Local data are in the folder that the environment variable ``TRACKIO_DIR`` names.

    Args:
        project: Name of the project.
        name: Name of the run; a resumed run of the same name continues it. Defaults to a new name by trackio.
        space_id: Space that shows the project, as ``user/space``. Defaults to null: this machine.

    Raises:
        UserError: If trackio is not installed.
    """

    def __init__(self, project: str, name: str | None = None, space_id: str | None = None) -> None:
        check_types(TrackioLogger, locals())
        super().__init__()
        try:
            self._trackio = import_module("trackio")
        except ImportError as error:
            raise UserError("TrackioLogger needs trackio; pip install trackio") from error
        self._project = project
        self._name = name
        self._space_id = space_id
        self._run: Any = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The ``trackio.Run``, which the first use begins."""
        if self._run is None:
            resume = "never" if self._name is None else "allow"
            options = {"name": self._name, "space_id": self._space_id, "resume": resume, "embed": False}
            self._run = self._trackio.init(project=self._project, **options)
            self._name = self._run.name
        return self._run

    @property
    def name(self) -> str:
        """Name of the project."""
        return self._project

    @property
    def version(self) -> str | None:
        """Name of the run; None before it begins if none was given."""
        return self._name

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self.experiment.config.update(_sanitize_params(_flatten_dict(_convert_params(params))))

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[Image.Image], step: int | None = None) -> None:
        """Log images, as ``SampleImages`` does.

        Args:
            key: Name of the images.
            images: The images.
            step: Optimizer step. Defaults to None: the next one of trackio.
        """
        shown = [self._trackio.Image(image) for image in images]
        self.experiment.log({key: shown[0] if len(shown) == 1 else shown}, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is not None:
            self._trackio.finish()
            self._run = None  # a later stage goes on with the run of this name
