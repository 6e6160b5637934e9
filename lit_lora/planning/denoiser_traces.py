"""The denoiser of a plan and what its part needs, kept for the plans of runs that differ only in what comes before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_lora.planning.fake_module import make_mode
from lit_lora.planning.optimizer_memory import tensors_of
from lit_lora.planning.storage_meter import StorageMeter

Sizes = dict[str, int]
"""Bytes by kind, relative to what was alive when the part began."""


class TraceDiffersError(Exception):
    """The encoders gave the denoiser other tensors than those with which its part was recorded."""


class _EncodedError(Exception):
    """The encoders are done; raised to leave out the rest of the step, which is known."""


@dataclass(frozen=True)
class Trace:
    """Memory and work of the part of a run that follows the encoders.

    Args:
        given: Tensors with which the part began, and the bytes alive then.
        held: Bytes alive before the encoders began, such as the optimizer's state.
        peaks: Bytes at the peak of each phase.
        work: Operations, as in :attr:`StorageMeter.work`.
        kept: Bytes alive afterwards.
    """

    given: Any
    held: Sizes
    peaks: dict[str, Sizes]
    work: list[tuple[int, int, int]]
    kept: Sizes


@dataclass(eq=False)
class DenoiserTraces:
    """Traces by what a run does, of modules whose denoisers are trained alike.

    Args:
        modules: Modules that may share the traces.
        traces: Traces by the options of a run beside its module.
        mode: Mode of the tensors of all these plans.
        denoisers: A built denoiser with its adapter that no plan uses now, by whether it is on a GPU.
    """

    modules: list[Any] = field(default_factory=list)
    traces: dict[Any, Trace] = field(default_factory=dict)
    mode: FakeTensorMode = field(default_factory=make_mode)
    denoisers: dict[bool, nn.Module] = field(default_factory=dict)


class TracedMeter:
    """A meter whose peaks after the encoders are recorded, or taken from a record.

    Args:
        meter: Meter of the simulation.
        known: Traces to read and extend.
        options: What the run does, as a key of the traces.
        sampling_options: Of these what drawing images depends on.
    """

    def __init__(self, meter: StorageMeter, known: dict[Any, Trace], options: Any, sampling_options: Any) -> None:
        self._meter = meter
        self._known = known
        self._options = options
        self._sampling_options = sampling_options
        self._reached: Callable[[Sizes, Any], None] | None = None

    def watch(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """The function of the encoders, such that this object learns of its end."""

        def watched(*args: Any) -> Any:
            before = dict(self._meter.alive)
            made = encode(*args)
            if self._reached is not None:
                self._reached(before, made)
            return made

        return watched

    def knows(self, name: str) -> bool:
        """Whether the part of this name is recorded."""
        return (name, self._options) in self._known

    def record(self, name: str, simulate: Callable[[], object]) -> object:
        """Simulate a step, and record its part after the encoders under a name; returns what the function returns."""
        meter, start = self._meter, dict(self._meter.alive)
        seen: dict[str, Any] = {}

        def reached(before: Sizes, made: Any) -> None:
            given = _described(made), _less(meter.alive, start)
            seen.update(given=given, held=_less(before, start), phase=meter.phase, done=len(meter.work))
            seen["before"] = meter.restart_phase()

        self._reached, phases = reached, set(meter.peaks)
        result = simulate()
        self._reached = None
        peaks = {phase: _less(peak, start) for phase, peak in meter.peaks.items() if phase not in phases}
        kept = _less(meter.alive, start)
        trace = Trace(seen["given"], seen["held"], peaks, meter.work[seen["done"] :], kept)
        self._known[name, self._options] = trace
        meter.merge_peak(seen["phase"], seen["before"], first=True)
        return result

    def replay(self, name: str, phase: str, simulate: Callable[[], object]) -> None:
        """Simulate the encoders of a step in a phase, and add its part after them as it was recorded.

        Raises:
            TraceDiffersError: If the encoders' outputs differ from those with which the part was recorded.
        """
        meter, trace, start = self._meter, self._known[name, self._options], dict(self._meter.alive)

        def reached(before: Sizes, made: Any) -> None:
            if (_described(made), _less(meter.alive, start)) != trace.given:
                raise TraceDiffersError
            raise _EncodedError

        self._reached = reached
        meter.adjust_all(trace.held)
        with meter:
            meter.begin(phase)
            try:
                simulate()
            except _EncodedError:
                pass
            finally:
                self._reached = None
            meter.begin(None)
        for one, peak in trace.peaks.items():
            meter.merge_peak(one, _more(start, peak))
        meter.work += trace.work
        meter.adjust_all(_less(trace.kept, trace.held))

    def denoise(self, name: str, given: Any, denoise: Callable[[], object]) -> Callable[[], None]:
        """Call the denoiser in the meter's phase, or add its peak as it was recorded; its output is not needed.

        Returns:
            Function to call after the context of autocast, in which casts of the trained weights are kept.

        Raises:
            TraceDiffersError: If the inputs differ from those with which the call was recorded.
        """
        meter, start, phase = self._meter, dict(self._meter.alive), self._meter.phase
        described = _described(given)
        assert phase is not None
        trace = self._known.get((name, self._sampling_options))
        if trace is not None:
            if trace.given != described:
                raise TraceDiffersError
            meter.merge_peak(phase, _more(start, trace.peaks[phase]))
            return partial(meter.adjust_all, trace.kept)
        before = meter.restart_phase()
        denoise()
        peaks = {phase: _less(meter.peaks[phase], start)}
        meter.merge_peak(phase, before, first=True)

        def end() -> None:
            self._known[name, self._sampling_options] = Trace(described, {}, peaks, [], _less(meter.alive, start))

        return end


def _described(made: Any) -> list[Any]:
    """Metadata of tensors, and which of them share a storage."""
    tensors: list[Tensor] = tensors_of(made)
    storages = [tensor.untyped_storage() for tensor in tensors]
    numbers = {id(storage): number for number, storage in enumerate(storages)}
    return [
        (
            one.dtype,
            one.shape,
            one.stride(),
            one.storage_offset(),
            one.requires_grad,
            storage.nbytes(),
            numbers[id(storage)],
        )
        for one, storage in zip(tensors, storages, strict=True)
    ]


def _less(sizes: Mapping[str, int], start: Mapping[str, int]) -> Sizes:
    return {kind: size - start.get(kind, 0) for kind, size in sizes.items()}


def _more(start: Mapping[str, int], sizes: Mapping[str, int]) -> Sizes:
    return {kind: size + sizes.get(kind, 0) for kind, size in start.items()}
