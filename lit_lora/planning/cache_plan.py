"""Plans the memory of ``lit-lora cache``, by encoding one batch on tensors without contents."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from lit_lora.errors import check_least
from lit_lora.families import ModelFamily, check_size
from lit_lora.parameters import module_bytes
from lit_lora.planning.cuda_semantics import CudaSemantics
from lit_lora.planning.fake_module import fake_tensors, planned_quantization, unloaded
from lit_lora.planning.planned_memory import PlannedMemory
from lit_lora.planning.run import Run
from lit_lora.planning.step import make_meter

BATCH_SIZE = 8
"""Images that ``lit-lora cache`` encodes at a time by default."""

BATCHES_AT_A_TIME = 64
"""Batches that go through each encoder in turn on a GPU, as in :mod:`lit_lora.datamodules.caching.cache_writer`."""


def plan_cache(run: Run, batch_size: int = BATCH_SIZE) -> PlannedMemory:
    """Plan a process of ``lit-lora cache`` that makes the cache of a run; its phases have the names of the encoders.

    On a GPU one encoder at a time is there, see :class:`~lit_lora.memory.one_on_device.OneOnDevice`. On the CPU all of them are.

    Args:
        run: Run that trains from the cache, whose :attr:`~lit_lora.planning.run.Run.cached` says what is encoded.
        batch_size: Images that are encoded at a time.

    Raises:
        UserError: If the configs of the base model cannot be read, or ``batch_size`` is too small.
    """
    check_least(1, batch_size=batch_size)
    random_state = torch.get_rng_state()
    try:
        with fake_tensors():
            phases = _CacheSimulation(run, batch_size).phases()
    finally:
        torch.set_rng_state(random_state)
    peak = max(sum(kinds.values()) for kinds in phases.values())
    return PlannedMemory(run.device.name, batch_size, phases, run.device.beside(peak))


class _CacheSimulation:
    """Simulates the encoding of a batch; use it inside :func:`fake_tensors`."""

    def __init__(self, run: Run, batch_size: int) -> None:
        self.run, self.batch_size, self.cuda = run, batch_size, run.device.is_cuda
        self.family: ModelFamily = unloaded(run.module).family
        self.family.text_quantization = planned_quantization(self.family.text_quantization, self.cuda)
        unneeded = {"denoiser"} if "text" in run.cached else {"denoiser", "text"}
        self.family.load(run.module.base_dtype, without=unneeded, weights=False)
        check_size(self.family, run.height, run.width)
        self.models = dict(self.family.named_children())
        self.meter = make_meter(self.cuda)
        for model in self.models.values():
            self.meter.assign([*model.parameters(), *model.buffers()], "frozen weights")
        if self.cuda:
            self.meter.adjust("frozen weights", -sum(self.meter.alive.values()))

    def phases(self) -> dict[str, dict[str, int]]:
        """Bytes of each kind at the peak of each encoder."""
        with CudaSemantics() if self.cuda else nullcontext(), torch.no_grad():
            self._encode_images()
            if "text" in self.run.cached:
                self._encode_captions()
        return self.meter.peaks

    def _encode_images(self) -> None:
        with self.meter:
            self._begin("vae", ["vae"])
            pixels = torch.empty(self.batch_size, 3, self.run.height, self.run.width, dtype=torch.uint8)
            for values in self.family.posterior(pixels):
                values.to(torch.float16 if values.dtype == torch.float32 else values.dtype)
            del pixels, values
            self._end(["vae"])

    def _encode_captions(self) -> None:
        """Run a batch through the text encoders; on a GPU other batches wait with what the encoders before have given."""
        text = [name for name in self.models if name != "vae"]
        before = sum(self.meter.alive.values())
        held = 0
        with self.meter:
            steps = self.family.encoding_steps([""] * self.batch_size)
            name = next(steps, None)
            while name is not None:
                names = text if name == "text" else [name]
                phase = text[0] if len(names) == 1 == len(text) else name
                self._begin(phase, names)
                name = next(steps, None)
                self._end(names)
                held, waiting = sum(self.meter.alive.values()) - before, held
                if self.cuda:
                    self.meter.peaks[phase]["activations"] += (BATCHES_AT_A_TIME - 1) * max(held, waiting)

    def _begin(self, phase: str, names: list[str]) -> None:
        if self.cuda:
            self.meter.adjust("frozen weights", sum(module_bytes(self.models[name]) for name in names))
        self.meter.begin(phase)

    def _end(self, names: list[str]) -> None:
        self.meter.begin(None)
        if self.cuda:
            self.meter.adjust("frozen weights", -sum(module_bytes(self.models[name]) for name in names))
