"""Plans the memory of a run by simulating one of its steps on tensors without contents."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from lit_lora.adapters import ADAPTER_NAME, adapter_state, method_of, plain_config
from lit_lora.adapters.in_place import peft_models
from lit_lora.adapters.methods.lora import leave_out
from lit_lora.adapters.ranked_layer import ranked_layers
from lit_lora.blocks import outermost_blocks
from lit_lora.draws import Draws
from lit_lora.families import check_size
from lit_lora.formats.peft import safetensors_bytes
from lit_lora.module import LoraDiffusion
from lit_lora.parameters import module_bytes, trainable_parameters
from lit_lora.planning.cuda_semantics import CudaSemantics
from lit_lora.planning.denoiser_traces import DenoiserTraces, TraceDiffersError, TracedMeter
from lit_lora.planning.fake_module import build, fake_tensors, unloaded
from lit_lora.planning.memory_plan import MemoryPlan
from lit_lora.planning.optimizer_memory import tensors_of
from lit_lora.planning.run import Run, Sampling
from lit_lora.planning.step import make_meter, simulate_step
from lit_lora.quantization.frozen_layer import frozen_layers, quantized_layers
from lit_lora.quantization.packed_convolution import PackedConv2d

_ORDER = ("load", "forward", "backward", "optimizer", "validation", "sampling")
_PART_OF = {"latents": "vae", "text": "text"}


def plan_run(module: LoraDiffusion, batch_size: int, height: int, width: int, **options: Any) -> MemoryPlan:
    """Plan the run of a module.

    Args:
        module: Module to train, loaded or not; it does not change.
        batch_size: Samples in a batch of one process.
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        options: Further arguments of :class:`~lit_lora.planning.run.Run`.

    Raises:
        UserError: If the configs of the base model cannot be read, or the run itself would raise a UserError.
    """
    return plan(Run(module, batch_size, height, width, **options))


def plan(run: Run) -> MemoryPlan:
    """Plan a run: build its module without weights and simulate one step in the order in which Lightning runs it.

    Raises:
        UserError: If the run cannot be planned: see :func:`plan_run`.
    """
    random_state = torch.get_rng_state()
    try:
        with _rare_collections():
            try:
                return _simulated(run)
            except TraceDiffersError:
                return _simulated(replace(run, traces=DenoiserTraces()))
    finally:
        torch.set_rng_state(random_state)


def _simulated(run: Run) -> MemoryPlan:
    with fake_tensors(run.traces.mode):
        return _Simulation(run).plan()


@contextmanager
def _rare_collections() -> Iterator[None]:
    """A context in which garbage is collected rarely: a plan makes many small objects that live long, and few cycles."""
    thresholds = gc.get_threshold()
    gc.set_threshold(100_000, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


class _Simulation:
    """Simulates a run on fake tensors; use it inside :func:`fake_tensors`."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.cuda = run.device.is_cuda
        run.module.text_training.check_cached(run.cached)
        self.text = self._cached_text() if "text" in run.cached else None
        self.shares_denoiser = self._shares_denoiser()
        known = run.traces.denoisers.pop(self.cuda, None) if self.shares_denoiser else None
        self.module = build(run.module, {_PART_OF[cached] for cached in run.cached}, self.cuda, known)
        self.family = self.module.family
        check_size(self.family, run.height, run.width)
        self.trained = trainable_parameters(self.module)
        self.share = run.processes.share(self.module, self.cuda)
        self.meter = make_meter(self.cuda)
        self.traced = self._traced()

    def _shares_denoiser(self) -> bool:
        """Whether what is known of the denoiser holds for this run: it is this module's, and no encoder is trained."""
        traces = self.run.traces
        traces.modules = traces.modules or [self.run.module]
        return any(module is self.run.module for module in traces.modules) and not self.run.module.text_training

    def _traced(self) -> TracedMeter:
        known = self.run.traces.traces if self.shares_denoiser else {}
        return TracedMeter(self.meter, known, self.run.denoiser_options, self.run.sampling_options)

    def plan(self) -> MemoryPlan:
        run, meter = self.run, self.meter
        tokens = self.family.new_token_rows().items()
        if run.leaves_out_start:
            _leave_out_start(self.module)
        file_bytes = sum(map(_file_bytes, self.family.adapted.models.values())) + sum(map(_token_bytes, tokens))
        self._count_parameters()
        self._load_phase()
        with ExitStack() as stack:
            if self.cuda:
                stack.enter_context(CudaSemantics())
            self._simulate_training()
            work, accumulated = meter.work, run.accumulate_grad_batches
            meter.work = []
            if run.validation:
                self._simulate_validation()
            if run.sampling:
                self._simulate_sampling(run.sampling)
        self._keep_denoiser()
        flops = sum(flops for flops, _, _ in work) * accumulated
        phases = {name: meter.peaks[name] for name in _ORDER if name in meter.peaks}
        peak = max(sum(kinds.values()) for kinds in phases.values())
        return MemoryPlan(
            device=run.device.name,
            batch_size=run.batch_size,
            height=run.height,
            width=run.width,
            phases=phases,
            beside=run.device.beside(peak),
            adapter_parameters=sum(parameter.numel() for parameter in self.trained),
            adapter_file_bytes=file_bytes,
            flops_per_step=flops,
            seconds_per_step=run.device.seconds(work) * accumulated,
            processes=run.processes.description,
            host_bytes=self.host_bytes,
        )

    def _keep_denoiser(self) -> None:
        """Keep the denoiser for the next plan, without what this one has left in it."""
        if self.shares_denoiser and not self.run.leaves_out_start:
            for parameter in self.trained:
                parameter.grad = None
            self.run.traces.denoisers[self.cuda] = self.family.denoiser

    def _count_parameters(self) -> None:
        frozen = [parameter for parameter in self.module.parameters() if not parameter.requires_grad]
        self.meter.assign([*frozen, *self.module.buffers()], "frozen weights")
        self.meter.assign(self.trained, "adapter")
        packed = sum(layer.packed_bytes for layer in self.module.modules() if isinstance(layer, PackedConv2d))
        self.meter.adjust("frozen weights", packed)
        self.meter.adjust_all(self.share.held)
        self._gather_while_denoising()
        self.encoder_bytes, self.host_bytes = self.share.encoding, 0
        if self.run.module.memory.offload_encoders:
            self.encoder_bytes = self.host_bytes = sum(map(module_bytes, self.family.frozen_encoding_models()))
            self.meter.adjust("frozen weights", -self.encoder_bytes)
        if self.encoder_bytes:
            self._encoders_come_and_go()
        own: Any = self.family
        own.encode = self.traced.watch(own.encode)
        if self.run.module.memory.offload_blocks:
            sizes = _block_sizes(self.family.denoiser, self.family.block_classes)
            together = [first + second for first, second in pairwise(sizes)]
            self.meter.adjust("frozen weights", max(together, default=sum(sizes)) - sum(sizes))
            self.host_bytes += 0 if self.run.module.memory.offload_folder else sum(sizes)

    def _load_phase(self) -> None:
        """Record the load phase; on the CPU the largest weight is in memory in float32, twice while it is quantized."""
        self.meter.begin("load")
        if not self.cuda:
            layers = frozen_layers(self.family)
            sizes = [layer.weight_shape.numel() * (4 if layer.is_dense else 8) for layer in layers]
            self.meter.adjust("other", max(sizes, default=0))
            self.meter.adjust("other", -max(sizes, default=0))
        # The part that is loaded last is complete until it is sharded.
        self.meter.adjust_all(self.share.gathered)
        self.meter.adjust_all({kind: -size for kind, size in self.share.gathered.items()})
        self.meter.begin(None)

    def _simulate_training(self) -> None:
        run, module = self.run, self.module
        batch = self._batch()
        draws = Draws(0, range(run.batch_size))

        def loss() -> Tensor:
            with self._trainer_autocast():
                losses, _ = module.losses(batch, draws)
                return losses.mean()

        if run.averaged:
            self.meter.adjust("other", sum(parameter.nbytes for parameter in self.trained))

        def step() -> object:
            return simulate_step(
                self.meter,
                self.trained,
                loss,
                module.optimizer,
                clip=run.gradient_clip_val is not None,
                accumulate=run.accumulate_grad_batches > 1,
                in_backward=run.module.memory.optimizer_in_backward,
                offload_activations=run.module.memory.offload_activations,
                cuda=self.cuda,
                share=self.share,
            )

        if self.traced.knows("training"):
            self.traced.replay("training", "forward", loss)
        else:
            self.optimizer = self.traced.record("training", step)
        self._count_method_state()

    def _count_method_state(self) -> None:
        """Count the state that the adapter's method keeps between steps; it exists from the second step on."""
        size = self.family.adapted.state_bytes()
        for phase in ("forward", "backward", "optimizer"):
            self.meter.peaks[phase]["other"] += size
        self.meter.adjust("other", size)

    def _simulate_validation(self) -> None:
        batch = self._batch()
        self.module.eval()

        def losses() -> None:
            with torch.no_grad(), self._trainer_autocast():
                self.module.losses(batch, Draws(0, range(self.run.batch_size)))

        def validate() -> None:
            with self.meter:
                self.meter.begin("validation")
                losses()
                self.meter.begin(None)

        if self.traced.knows("validation"):
            self.traced.replay("validation", "validation", losses)
        else:
            self.traced.record("validation", validate)
        self.module.train()

    def _simulate_sampling(self, sampling: Sampling) -> None:
        """Simulate one step of the denoiser, then the decoder of the VAE."""
        family, module, count = self.family, self.module, sampling.images
        height, width = sampling.size(family.default_size)
        seen = count * family.sampling_passes(sampling.guidance_scale)
        batch = {"target_size": torch.tensor([[height, width]] * seen)}
        shape = family.latent_shape(height, width)
        if family.takes_sources:
            batch["source_latents"] = torch.empty(seen, *shape)
        module.eval()
        with torch.no_grad(), family.all_parts():
            frozen = (p for model in family.encoding_models() for p in model.parameters() if not p.requires_grad)
            self.meter.assign(frozen, "frozen weights")
            self.meter.adjust("frozen weights", self.encoder_bytes)
            with self.meter:
                self.meter.begin("sampling")
                with module.autocast():
                    text = family.encode_captions([""] * seen)
                    latents = torch.empty(seen, *shape, dtype=family.dtype)
                    conditioning = family.conditioning(text, batch, latents)
                    given = latents, conditioning
                    end = self.traced.denoise(
                        "sampling", given, lambda: family.denoise(latents, torch.zeros(seen), conditioning)
                    )
                end()
                family.decode(latents[:count]).float()
                self.meter.begin(None)
            self.meter.adjust("frozen weights", -self.encoder_bytes)
        module.train()

    def _batch(self) -> dict[str, Any]:
        run, family = self.run, self.family
        size = [[run.height, run.width]] * run.batch_size
        names = [""] * run.batch_size
        batch: dict[str, Any] = {"caption": names, "key": names, "target_size": torch.tensor(size)}
        batch["prior"] = [False] * run.batch_size
        if "latents" in run.cached:
            mean = torch.empty(run.batch_size, *family.latent_shape(run.height, run.width))
            batch |= {"latents_mean": mean, "latents_std": torch.empty_like(mean)}
        else:
            batch["pixel_values"] = torch.empty(run.batch_size, 3, run.height, run.width, dtype=torch.uint8)
        if family.takes_sources:
            cached = "latents" in run.cached
            name, like = ("source_latents", "latents_mean") if cached else ("source_pixel_values", "pixel_values")
            batch[name] = torch.empty_like(batch[like])
        if self.text is not None:
            batch["text_embeddings"] = {name: torch.empty_like(value) for name, value in self.text.items()}
        self.meter.assign(tensors_of(batch), "other")
        return batch

    def _cached_text(self) -> dict[str, Tensor]:
        """Text embeddings in the shapes that the text encoders give."""
        family: Any = unloaded(self.run.module).family
        family.load(self.run.module.base_dtype, without={"vae", "denoiser"}, weights=False)
        with torch.no_grad():
            embeddings: dict[str, Tensor] = family.encode_captions([""] * self.run.batch_size)
        return embeddings

    def _gather_while_denoising(self) -> None:
        """Count what is gathered from the denoiser's start to its end, or to the end of the backward pass."""
        own: Any = self.family
        denoise, gathered = own.denoise, self.share.gathered

        def gathering(*args: Any, **kwargs: Any) -> Any:
            self.meter.adjust_all(gathered)
            try:
                return denoise(*args, **kwargs)
            finally:
                if not torch.is_grad_enabled():
                    self.meter.adjust_all({kind: -size for kind, size in gathered.items()})

        if gathered:
            own.denoise = gathering

    def _encoders_come_and_go(self) -> None:
        own: Any = self.family
        encode = own.encode

        def encode_on_device(*args: Any) -> Any:
            self.meter.adjust("frozen weights", self.encoder_bytes)
            try:
                return encode(*args)
            finally:
                self.meter.adjust("frozen weights", -self.encoder_bytes)

        own.encode = encode_on_device

    def _trainer_autocast(self) -> AbstractContextManager[Any]:
        """The context of the trainer's mixed precision."""
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.run.precision)
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def _block_sizes(denoiser: nn.Module, block_classes: Sequence[str]) -> list[int]:
    """Bytes of the frozen weights in each block."""
    return [
        sum(layer.get_parameter(name).nbytes for layer in frozen_layers(block) for name in layer.stored_names)
        for block in outermost_blocks(denoiser, block_classes)
    ]


def _leave_out_start(module: nn.Module) -> None:
    """Let the files leave out first values: of the quantized layers if there are any, of all LoRA layers otherwise."""
    layers = ranked_layers(module)
    quantized = {id(layer) for layer in quantized_layers(module)}
    chosen = [layer for layer in layers if id(layer.layer.get_base_layer()) in quantized] or layers
    for _, model in peft_models(module):
        own = [layer for layer in chosen if layer.config is model.peft_config[ADAPTER_NAME]]
        leave_out(model, {layer.name: (layer.a.detach().cpu(), layer.b.detach().cpu()) for layer in own})


def _file_bytes(model: PeftModel) -> int:
    """Bytes of the PEFT file of a part's adapter after training."""
    config = model.peft_config[ADAPTER_NAME]
    in_file, _ = method_of(config).planned(model, adapter_state(model), plain_config(config))
    return safetensors_bytes(in_file)


def _token_bytes(token: tuple[str, dict[str, Tensor]]) -> int:
    """Bytes of the file of a new token."""
    return safetensors_bytes(token[1])
