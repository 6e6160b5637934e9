"""Sample images of fixed prompts during training."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import save_image

from lit_lora.argument_types import check_types
from lit_lora.callbacks.adapter_ema import AdapterEMA
from lit_lora.callbacks.logged_image import log_image
from lit_lora.callbacks.schedule_free import learned_weights
from lit_lora.distributed.collectives import gather
from lit_lora.errors import UserError, check_whole
from lit_lora.families import check_edits
from lit_lora.files import atomic_file
from lit_lora.formats import add_sample
from lit_lora.module import LoraDiffusion
from lit_lora.profiling.phases import phase
from lit_lora.prompts import images_to_edit, prompt_groups, read_prompts
from lit_lora.run_folder import run_folder
from lit_lora.sampling import NonFiniteImageError, image_grid


class SampleImages(Callback):
    """Draws images of fixed prompts from fixed seeds while a run trains.

    A grid of the images goes to ``samples/step-NNNNNN.png`` in the run's folder and to TensorBoard, Weights & Biases or MLflow as
    ``samples``, and the latest one into the model cards of :class:`AdapterCheckpoint`. With :class:`AdapterEMA` the averaged
    weights are used. Sampling does not change the random number generators
    of training. The module needs a ``generate`` method like that of :class:`~lit_lora.LoraDiffusion`.

    Args:
        prompts: Prompts, with one image for each; or a file of prompts, as for ``lit-lora sample --prompts``, whose entries
            may have a seed, size and negative prompt of their own.
        every_n_steps: Optimizer steps between two grids. Defaults to 500. One grid is also drawn before the first step, and one
            at the end of training, whatever ends it but an error or a signal.
        seed: Seed of the first prompt; prompt ``i`` is drawn from ``seed + i``. Defaults to 0.
        num_inference_steps: Number of denoising steps. Defaults to 25.
        guidance_scale: Scale of classifier-free guidance; 1 turns it off. Defaults to 5.0.
        height: Height of an image in pixels. Defaults to the model's.
        width: Width of an image in pixels. Defaults to the model's.
        columns: Number of images in a row of the grid. Defaults to 4.

    Raises:
        UserError: If there are no prompts, their file cannot be read, or ``every_n_steps``, ``num_inference_steps`` or
            ``columns`` is below 1; once the run starts, if the module has no ``generate``, or the trainer has another of these
            callbacks.
    """

    def __init__(
        self,
        prompts: str | list[str],
        every_n_steps: int = 500,
        seed: int = 0,
        num_inference_steps: int = 25,
        guidance_scale: float = 5.0,
        height: int | None = None,
        width: int | None = None,
        columns: int = 4,
    ) -> None:
        check_types(SampleImages, locals())
        if not prompts:
            raise UserError("SampleImages needs at least one prompt")
        check_whole(1, every_n_steps=every_n_steps, num_inference_steps=num_inference_steps, columns=columns)
        check_whole(1, height=height, width=width)
        check_whole(0, seed=seed)
        self.given = [prompts] if isinstance(prompts, str) else prompts
        """Texts and files of prompts, as they were given."""
        self.prompts = [prompt.filled(seed=seed + i) for i, prompt in enumerate(read_prompts(prompts))]
        self.every_n_steps = every_n_steps
        self.seed = seed
        self.columns = columns
        self.options = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "height": height,
            "width": width,
        }
        self.latest: Path | None = None
        """Latest grid that shows what was learned, in the first process."""
        self._step = -1  # the last one seen
        self._shown = -1  # the last one drawn
        self._told = False
        self._saved: tuple[int, list[Path]] = (-1, [])  # the step of the latest adapters, and their folders

    @classmethod
    def of(cls, trainer: Trainer) -> SampleImages | None:
        """The trainer's :class:`SampleImages`; None if it has none."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, cls)), None)

    @property
    def description(self) -> str:
        """What a grid shows, for model cards."""
        lines = [f"- {prompt}" for prompt in self.prompts]
        scale, steps = self.options["guidance_scale"], self.options["num_inference_steps"]
        return "\n".join([f"Guidance scale {scale}, {steps} steps, row by row:", "", *lines])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not hasattr(pl_module, "generate"):
            raise UserError(
                f"SampleImages calls the module's generate(prompts, seeds, **options), which {type(pl_module).__name__} does not "
                f"have; define it as LoraDiffusion.generate, or remove SampleImages from trainer.callbacks"
            )
        if any(prompt.image for prompt in self.prompts) and isinstance(pl_module, LoraDiffusion):
            check_edits(type(pl_module.family))
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, SampleImages) for callback in callbacks) > 1:
            raise UserError(
                "several SampleImages would replace each other's samples/step-NNNNNN.png; give all prompts to one of them, in a "
                "file in which each may have settings of its own"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = self._shown = trainer.global_step
        self.latest, self._saved = None, (-1, [])
        if trainer.global_step == 0:
            self._draw(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            if self._step % self.every_n_steps == 0:
                self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self._shown:
            return
        self._draw(trainer, pl_module)
        step, folders = self._saved
        for folder in folders if step == trainer.global_step else []:  # adapters of this step are saved already
            self._add_to(folder)

    def show_in(self, folder: Path, step: int) -> None:
        """Show the latest grid in the model card of an adapter that is saved; one that the end of training draws, too.

        Args:
            folder: Folder of the adapter.
            step: Optimizer step at which it is saved.
        """
        self._saved = step, [*(self._saved[1] if self._saved[0] == step else []), folder]
        self._add_to(folder)

    def _add_to(self, folder: Path) -> None:
        if self.latest is not None and folder.exists():
            add_sample(folder, self.latest, self.description)

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._shown = trainer.global_step
        # Asking for the run's folder is a collective call.
        folder = Path(run_folder(trainer)) / "samples"
        ema = AdapterEMA.of(trainer)
        with phase("sampling"), learned_weights(trainer), ema.averaged(pl_module) if ema else nullcontext():
            mine = self._drawn(trainer, cast(Any, pl_module))
        images: dict[int, Image.Image] = {}
        problems: list[str] = []
        for own, found in gather(mine):
            images |= own
            problems += found
        if not trainer.is_global_zero:
            return
        if problems:
            rank_zero_warn(f"no images are written at step {trainer.global_step}: {problems[0]}")
            return
        grid = image_grid([images[place] for place in range(len(self.prompts))], self.columns)
        path = folder / f"step-{trainer.global_step:06d}.png"
        with atomic_file(path) as part:
            save_image(grid, part, format="png")
        self.latest = path if trainer.global_step else None
        shown = to_pil_image(grid)
        told = [
            type(one).__name__ for one in trainer.loggers if not log_image(one, "samples", shown, trainer.global_step)
        ]
        if told and not self._told:
            self._told = True
            rank_zero_info(f"{', '.join(told)} shows no images; the samples are in {folder}")

    def _drawn(self, trainer: Trainer, module: Any) -> tuple[dict[int, Image.Image], list[str]]:
        """The images of this process by the places of their prompts, and why others could not be drawn."""
        images: dict[int, Image.Image] = {}
        problems = []
        for places, options in prompt_groups(self.prompts, self.options):
            # Every process draws the same number of images, since with sharded weights all processes compute together.
            each = math.ceil(len(places) / trainer.world_size)
            mine = [places[min(trainer.global_rank * each + i, len(places) - 1)] for i in range(each)]
            prompts = [self.prompts[place] for place in mine]
            if any(negatives := [one.negative_prompt or "" for one in prompts]):
                options["negative_prompts"] = negatives
            options |= images_to_edit(prompts)
            try:
                drawn = module.generate([one.prompt for one in prompts], [one.seed for one in prompts], **options)
                images |= dict(zip(mine, drawn, strict=True))
            except NonFiniteImageError as error:  # training may be well where sampling overflows
                problems.append(str(error))
        return images, problems
