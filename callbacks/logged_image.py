"""Shows an image in a logger, whichever it is."""

from __future__ import annotations

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from PIL import Image


def log_image(logger: Logger, name: str, image: Image.Image, step: int) -> bool:
    """Show an image in a logger; whether it can show images at all.

    TensorBoard, MLflow, and loggers with a ``log_image`` like that of Weights & Biases can. To be called by the first process.

    Args:
        logger: Logger of the run.
        name: Name of the image, the same at each step.
        image: The image.
        step: Optimizer step that it belongs to.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, np.asarray(image), step, dataformats="HWC")
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, image, key=name, step=step)
    elif hasattr(logger, "log_image"):
        logger.log_image(name, [image], step=step)
    else:
        return False
    return True
