"""The training step: a diffusion model's denoiser, adapted through PEFT, under Lightning."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Self

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import PeftConfig
from PIL import Image
from torch import Tensor

from lit_lora.adapters import check_finite, check_loaded, check_saved_configs
from lit_lora.adapters.input_dtype import keep_input_dtype
from lit_lora.adapters.parameter_groups import ParameterGroup, make_optimizer, make_schedule
from lit_lora.argument_types import check_types
from lit_lora.caption_dropout import drop_captions
from lit_lora.denoiser_options import apply_options
from lit_lora.described import described
from lit_lora.distributed import shards_weights
from lit_lora.distributed.node import Node
from lit_lora.distributed.optimizer_states import make_portable
from lit_lora.draws import Draws, slots_of
from lit_lora.errors import UserError, check_whole
from lit_lora.families import Batch, ModelFamily, check_batch, check_size, prepare, source_images, target_size
from lit_lora.files import atomic_folder
from lit_lora.formats import marker_of, write_adapter
from lit_lora.formats.base_adapter import BaseAdapter
from lit_lora.formats.base_adapters import BaseAdapters
from lit_lora.formats.base_records import base_metadata
from lit_lora.formats.facts import training_facts
from lit_lora.formats.from_file import FromFile
from lit_lora.formats.info import AdapterInfo
from lit_lora.formats.of_family import files_of
from lit_lora.log_mean import log_mean
from lit_lora.loops import accumulating
from lit_lora.loss_by_time import LossByTime
from lit_lora.memory.activation_offload import ActivationOffload
from lit_lora.memory.encoder_offload import EncoderOffload
from lit_lora.memory.freed_gradients import free_gradients
from lit_lora.memory.optimizer_in_backward import OptimizerInBackward
from lit_lora.memory.options import MemoryOptions
from lit_lora.objectives import Objective
from lit_lora.optimizer_settings import check_clipping
from lit_lora.progress_bar import shows_logged
from lit_lora.quantization import Dense, Quantization
from lit_lora.run_checks import check_arguments, check_data, check_other_callbacks, check_run, warn_if_never_validated
from lit_lora.sampling import SamplingOptions
from lit_lora.text_training import TextTraining

VALIDATION_SEED = 20_240_229
"""Seed of validation's timesteps and noise; it is the same in every run, so that losses of runs can be compared."""

_ENCODER_OF = {"latents": "vae", "text": "text"}
"""Part of a family that computes each kind of data that a datamodule may read from a cache (its ``cached``)."""


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4)


class LoraDiffusion(LightningModule):
    """Trains an adapter in the denoiser of a diffusion model, and in its text encoders if asked to; everything else is frozen.

    Adapter and optimizer state are float32; the frozen base is stored in ``base_dtype`` and computed with under autocast,
    which is why ``Trainer(precision=...)`` stays at its default.

    Args:
        family: Model family of the base, with the location of its weights.
        adapter: PEFT config of a method that adapts layers, or :class:`FromFile` to go on with a saved adapter. Without
            ``target_modules`` the family's default layers are adapted. None trains in the text encoders alone.
        objective: Distribution of timesteps and noise, and the loss; defaults to the family's objective, ``DDPM`` or
            ``FlowMatching``.
        optimizer: Function from the trainable parameters to their optimizer; defaults to AdamW with a learning rate of 1e-4.
        parameter_groups: Trained parameters with a learning rate or weight decay of their own, by patterns of their names;
            defaults to none.
        lr_scheduler: Function from the optimizer to its learning rate schedule, which is stepped at every optimizer step;
            defaults to a constant learning rate.
        quantization: Quantization of the frozen weights in the denoiser's Linear and Conv2d layers, such as ``NF4``; defaults
            to none, so that they are stored in ``base_dtype``.
        base_dtype: dtype of the other frozen weights and of the forward pass; defaults to bfloat16. With float16 also set
            ``trainer.precision`` to ``16-mixed``, which scales the loss.
        caption_dropout: Probability that a sample is trained with the empty caption, for classifier-free guidance; defaults
            to 0.
        memory: Options that trade time or exactness for memory; all are off by default.
        compile_blocks: Compile the denoiser's blocks: minutes at the start, and less time in each step; off by default.
        sampling: Options of the images that ``predict`` draws; defaults to 25 steps at a guidance scale of 5.
        seed: Seed of timesteps, noise and caption dropout, and of the images that ``predict`` draws; defaults to 0.
        text_adapter: PEFT config from which each of the family's CLIP text encoders gets an adapter of its own; they are then
            trained with the denoiser. Defaults to none, or to those that a :class:`FromFile` brings along.
        new_tokens: New tokens such as ``<cat-toy>`` whose embeddings are trained (textual inversion), each with what it
            starts from: words, a number of random vectors, or the file of an embedding. Defaults to none.
        base_adapters: Adapters to merge into the base, so that this one is trained over them; defaults to none.
        convolutions: Memory layout of the convolutions' weights: ``plain`` (default), ``channels_last``, or ``packed``, on
            CPUs.
        fused_lora: Compute LoRA and its frozen Linear layer with fewer operations, which round slightly differently; off by
            default.

    Raises:
        UserError: If ``caption_dropout`` is outside [0, 1], an adapter's file cannot be used, the family's text encoders cannot
            be trained, or nothing would be trained.
    """

    def __init__(
        self,
        family: ModelFamily,
        adapter: PeftConfig | None,
        objective: Objective | None = None,
        optimizer: OptimizerCallable = _adamw,
        parameter_groups: Sequence[ParameterGroup] = (),
        lr_scheduler: LRSchedulerCallable | None = None,
        quantization: Quantization | None = None,
        base_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        caption_dropout: float = 0.0,
        memory: MemoryOptions = MemoryOptions(),
        compile_blocks: bool = False,
        sampling: SamplingOptions = SamplingOptions(),
        seed: int = 0,
        text_adapter: PeftConfig | None = None,
        new_tokens: dict[str, int | str] | None = None,
        base_adapters: Sequence[BaseAdapter] = (),
        convolutions: Literal["plain", "channels_last", "packed"] = "plain",
        fused_lora: bool = False,
    ) -> None:
        super().__init__()
        check_arguments(family, adapter, text_adapter, objective, optimizer, quantization, base_dtype)
        check_types(LoraDiffusion, locals())
        check_whole(0, seed=seed)
        if not 0 <= caption_dropout <= 1:
            raise UserError(f"caption_dropout={caption_dropout} is not a probability; it must lie in [0, 1]")
        self.family = family
        self.base_adapters = BaseAdapters(base_adapters, type(family))
        self.saved = adapter if isinstance(adapter, FromFile) else None
        over = self.base_adapters.records
        self.adapter = adapter.config(type(family), over, quantization) if isinstance(adapter, FromFile) else adapter
        self.text_training = TextTraining(family, adapter, text_adapter, new_tokens)
        self.objective: Objective = objective or family.default_objective()
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.parameter_groups = tuple(parameter_groups)
        self.quantization = quantization or Dense()
        self.base_dtype: torch.dtype = getattr(torch, base_dtype)
        self.caption_dropout, self.memory = caption_dropout, memory
        family.split_vae(memory.vae_slicing, memory.vae_tiling)
        family.text_quantization = memory.text_encoder_quantization
        self.compile_blocks, self.convolutions, self.fused_lora = compile_blocks, convolutions, fused_lora
        self.sampling, self.seed = sampling, seed
        # A checkpoint need not hold the frozen base.
        self.strict_loading = False
        self.register_load_state_dict_post_hook(check_loaded)
        self._configured, self._encoder_offload, self._by_time = False, EncoderOffload(), LossByTime()
        self._reader: Node | None = None
        self._in_backward: OptimizerInBackward | None = None

    def setup(self, stage: str) -> None:
        check_run(self, stage)

    def configure_callbacks(self) -> list[Callback]:
        # The first hook of a run: before those callbacks begin.
        check_other_callbacks(self.trainer, StochasticWeightAveraging)
        return self._by_time.attached(self.trainer)

    def configure_model(self) -> None:
        """Load the frozen base and put the adapter into it; Lightning calls this before each stage.

        Encoders whose outputs the datamodule reads from a cache are not loaded. A second call only loads encoders that the
        first one left out.
        """
        # Lightning would build on the device, where the same seed gives other initial values and some PEFT methods fail.
        strategy: Any = None if self._trainer is None else self.trainer.strategy
        sharded = shards_weights(strategy)
        with torch.device("cpu"):
            node = self._node()
            dispensable = self.dispensable_parts() | ({"denoiser"} if sharded else set())
            if not self._configured:
                self._scheduler_config = prepare(self.family, self.objective)
                check_data(self)
            into = self.base_adapters.changes(dispensable)
            self.family.load(
                self.base_dtype, without=dispensable, quantization=self.quantization, node=node, changes=into
            )
            if not self._configured:
                self._adapt(strategy, sharded)
            if self.memory.offload_encoders:
                for encoder in self.family.frozen_encoding_models():
                    self._encoder_offload.add(encoder)
        self._configured = True

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = make_optimizer(self.optimizer, self, self.parameter_groups)
        check_clipping(optimizer, self._trainer)
        make_portable(optimizer, self)
        if self.lr_scheduler is None:
            return optimizer
        steps = -1 if self._trainer is None else self.trainer.max_steps
        return {"optimizer": optimizer, "lr_scheduler": make_schedule(self.lr_scheduler, optimizer, steps)}

    def on_fit_start(self) -> None:
        if self.memory.optimizer_in_backward:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            self._in_backward = OptimizerInBackward(optimizer, float(self.trainer.gradient_clip_val or 0))

    def on_train_start(self) -> None:
        # It asks for the loader, which before would not get the checkpoint's position.
        self.family.adapted.start(self.trainer)
        warn_if_never_validated(self.trainer)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        if self._in_backward is None:  # otherwise OptimizerInBackward clips: no gradients are left here
            super().configure_gradient_clipping(*args, **kwargs)

    def teardown(self, stage: str) -> None:
        self._reader = None  # the next run may have other processes
        if self._in_backward is not None:
            self._in_backward.remove()
            self._in_backward = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        check_batch(self.family, batch, values=batch_idx == 0)
        draws = Draws(self.seed, slots_of(batch, self.trainer.fit_loop.total_batch_idx, self.trainer), self.device)
        losses, _ = self.losses(drop_captions(batch, draws, self.caption_dropout), draws, self._by_time)
        loss = losses.mean()
        self.log("train/loss", loss, prog_bar=shows_logged(self.trainer), batch_size=len(losses), sync_dist=True)
        penalty = self.family.adapted.penalty()
        return loss if penalty is None else loss + penalty

    def on_train_epoch_end(self) -> None:
        self.family.token_uses.warn_unused(self.family.new_tokens)
        self.objective.on_train_epoch_end()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        step = self.trainer.global_step + 1
        super().optimizer_step(*args, **kwargs)
        self.family.adapted.after_step(step)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if not accumulating(self.trainer):
            free_gradients(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["adapter_methods"] = self.family.adapted.state()
        checkpoint.update(new_tokens=self.family.new_tokens, base_adapters=list(self.base_adapters.records))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_saved_configs(self, checkpoint.get("lit_lora", {}).get("adapters", {}), before_loading=True)
        self.base_adapters.check(checkpoint.get("base_adapters", []))
        self.text_training.check_resumed(self.family, checkpoint.get("new_tokens", {}))
        self.family.adapted.restore(checkpoint.get("adapter_methods", {}))

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        loss, count = self.validation_loss(batch, batch_idx, self._by_time)
        log_mean(self, "val/loss", loss, count, prog_bar=True)
        return loss

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        loss, count = self.validation_loss(batch, batch_idx, self._by_time)
        log_mean(self, "test/loss", loss, count)
        return loss

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[Image.Image]:
        """Draw one image for each caption, in the size of the batch's images, and from the sources of editing pairs."""
        check_batch(self.family, batch, values=False)
        height, width = target_size(batch)[0].tolist()
        seeds = [self.seed + slot for slot in slots_of(batch, batch_idx, self.trainer, dataloader_idx)]
        return self.generate(batch["caption"], seeds, height=height, width=width, **source_images(batch))

    def generate(self, prompts: Sequence[str], seeds: Sequence[int] | None = None, **options: Any) -> list[Image.Image]:
        """Draw one image for each prompt with the current weights.

        Args:
            prompts: Prompts to draw.
            seeds: Seeds of the initial noise, one for each prompt. Defaults to the module's seed and those that follow it.
            **options: Further options of :func:`lit_lora.sampling.generate`; steps and guidance default to ``sampling``.

        Raises:
            UserError: If the base is not loaded yet, or cannot draw images of the given height and width.
        """
        if not self._configured:
            raise UserError("the base is not loaded yet: call generate after trainer.fit, in the same process")
        height, width = (options.get(edge) or self.family.default_size for edge in ("height", "width"))
        check_size(self.family, height, width)
        options = vars(self.sampling) | options
        was_training = self.training
        self.eval()
        try:
            with self.family.all_parts(), self._encoder_offload.on_device(), self.autocast():
                seeds = range(self.seed, self.seed + len(prompts)) if seeds is None else seeds
                return self.family.generate(prompts, seeds, self._scheduler_config, **options)
        finally:
            self.train(was_training)

    def cache_identity(self) -> dict[str, str]:
        """Identities of the VAE (``"vae"``) and the text encoders (``"text"``), and the dtype they compute in, for a cache."""
        return self.family.identity() | {"base_dtype": described(self.base_dtype)}

    def save_adapter(self, folder: str | Path, formats: Sequence[str] = (), info: AdapterInfo | None = None) -> None:
        """Write the adapter to a folder in PEFT's format, and as diffusers' LoRA file if that format can hold it.

        A folder with an older adapter is replaced atomically. If the weights are sharded over several processes, all of them must
        call this method; the first one writes.

        Args:
            folder: Folder to write.
            formats: Names of further formats to write: see :data:`lit_lora.formats.FORMATS`. Defaults to none.
            info: What users should know about the adapter, for metadata and model card; defaults to nothing.

        Raises:
            UserError: If the folder cannot be written or holds other files, the adapter holds NaN or Inf, there is none yet, or
                one of the formats cannot hold it.
        """
        if not self._configured:
            raise UserError("the module has no adapter yet: call save_adapter after trainer.fit, in the same process")
        tensors, new_tokens = self.family.adapted.tensors(), self.family.new_token_rows()
        for state in (*tensors.values(), *new_tokens.values()):
            check_finite(state, "adapter", "train with a lower lr or trainer.gradient_clip_val: 1.0", self)
        if self._trainer is not None and not self.trainer.is_global_zero:
            return
        metadata = training_facts(self) | base_metadata(self.base_adapters.records) | (info or AdapterInfo()).metadata
        files = files_of(self.family, tensors, new_tokens, metadata)
        with atomic_folder(folder, marker=marker_of(files)) as part:
            write_adapter(files, part, formats)

    def validation_loss(self, batch: Batch, batch_idx: int, by_time: LossByTime | None = None) -> tuple[Tensor, int]:
        """Mean loss of the batch at fixed timesteps and noise, and the number of its samples that count; see :meth:`losses`."""
        check_batch(self.family, batch, values=batch_idx == 0)
        draws = Draws(VALIDATION_SEED, slots_of(batch, batch_idx, self.trainer), self.device)
        # Not in inference mode: training uses tensors that a denoiser computes here and keeps.
        with torch.inference_mode(False), torch.no_grad():
            losses, weight = self.losses(batch, draws, by_time)
        return losses.sum() / weight.sum().clamp(min=1), int(weight.sum())

    def losses(self, batch: Batch, draws: Draws, by_time: LossByTime | None = None) -> tuple[Tensor, Tensor]:
        """Weighted loss of each sample, and its weight in the batch; float32 ``(B,)`` each. ``by_time`` is given the losses."""
        with self.autocast(), self._encoder_offload.on_device():
            latents, conditioning = self.family.encode(batch, draws)
        sample = self.objective.sample(latents, draws, self.family.num_tokens(latents.shape[1:]))
        kept = ActivationOffload(self.device.type == "cuda") if self.memory.offload_activations else nullcontext()
        with self.autocast(), kept:
            prediction = self.family.denoise(sample.noisy, sample.timesteps, conditioning)
        counts = batch["weight"] if "weight" in batch else torch.ones_like(sample.weight)
        losses = self.objective.loss(prediction, self.objective.counted(sample, batch)) * counts
        if by_time is not None:
            by_time.add(losses, counts, sample.level.time)
        return losses, counts

    def dispensable_parts(self) -> set[str]:
        """Names of the family's parts that the run does not need, because the datamodule reads their outputs from a cache."""
        trainer = self._trainer
        if trainer is None or trainer.predicting:  # drawing images needs all parts
            return set()
        datamodule = getattr(trainer, "datamodule", None)
        return {_ENCODER_OF[cached] for cached in getattr(datamodule, "cached", ())}

    def unloaded(self) -> Self:
        """A copy of the module with the same options, as it was before :meth:`configure_model`."""
        fresh = copy.copy(self)
        fresh._modules, fresh._device, fresh._configured = {}, torch.device("cpu"), False
        fresh._trainer, fresh._reader, fresh._in_backward = None, None, None
        fresh._encoder_offload, fresh.family = EncoderOffload(), self.family.unloaded()
        fresh.adapter, fresh.text_training = copy.deepcopy(self.adapter), copy.copy(self.text_training)
        fresh.objective = copy.deepcopy(self.objective)
        return fresh

    def autocast(self) -> AbstractContextManager[Any]:
        """A context that computes in the base's dtype and casts the adapter's float32 weights when they are used.

        With a float32 base the trainer's own precision applies.
        """
        if self.base_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.base_dtype)

    def take_non_finite(self) -> Tensor | None:
        """Whether ``optimizer_in_backward`` met a NaN or Inf gradient since this was last read: a bool scalar, None without it.

        :class:`~lit_lora.callbacks.FiniteGradients` reads it, since no gradients are left for it to look at.
        """
        return None if self._in_backward is None else self._in_backward.take_non_finite()

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Names of the frozen tensors, which DDP neither broadcasts nor synchronizes: every process reads the same base."""
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        return [name for name in (*frozen, *dict(self.named_buffers())) if name.startswith("family.")]

    @property
    def adapter_configs(self) -> list[PeftConfig]:
        """Configs of all adapters, the denoiser's first."""
        return [config for config in (self.adapter, *self.text_training.adapters.values()) if config is not None]

    def _adapt(self, strategy: Any, sharded: bool) -> None:
        """Put the adapters into the loaded parts, and set what changes the denoiser's blocks; see :meth:`configure_model`."""
        family = self.family
        if self.adapter is not None:
            if sharded:
                family.load_adapted(self.adapter, strategy.shard, self.saved and self.saved.start)
            else:
                family.add_adapter(self.adapter, self.saved and self.saved.start)
        self.text_training.add(family, strategy.shard if sharded else None)
        keep_input_dtype(family.denoiser)
        apply_options(self)
        family.train()
        self.base_adapters.warn_of_rounding(self.base_dtype, "set model.base_dtype to float32 if that matters")

    def _node(self) -> Node:
        """The processes of this machine, of which one reads the base's files."""
        self._reader = self._reader or Node.of(self._trainer, self.memory.offload_folder)
        return self._reader
