"""Counts the bytes of all live tensors, and the work of the operations that create them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from lit_lora.planning.known_calls import DEVICE_OF
from lit_lora.profiling.kinds import KINDS

InsideOf = Callable[[Any, tuple[Any, ...], Any], int]
"""Function from an operation, its arguments and its result to the bytes of its temporary memory."""

_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._int_mm: flop_registry[torch.ops.aten.mm],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


class StorageMeter(TorchDispatchMode):
    """A dispatch mode that counts every storage created by an operation for as long as the storage lives.

    A storage is counted once, however many views it has, as :attr:`kind` unless :meth:`assign` changes that. Bytes by kind are
    kept for the peak of each phase. Storages of fake tensors have the right size and take no memory.

    Args:
        inside: Function that gives the temporary memory inside an operation.
        granularity: The allocator rounds sizes up to a multiple of this many bytes; defaults to 1.
    """

    def __init__(self, inside: InsideOf, granularity: int = 1) -> None:
        super().__init__()
        self.inside = inside
        self.granularity = granularity
        self.kind = "activations"
        self.alive = dict.fromkeys(KINDS, 0)
        self.peaks: dict[str, dict[str, int]] = {}
        """Bytes by kind at the peak of each phase."""
        self.work: list[tuple[int, int, int]] = []
        """For each operation since the first :meth:`begin`: floating point operations, bytes read and written, and bytes per
        element."""
        self._total = 0
        self._owners: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._kinds: dict[int, str] = {}
        self._phase: str | None = None
        self._peak = -1

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing is compiled here, and telling torch's compiler so takes as long as an operation itself."""
        return False

    def begin(self, phase: str | None) -> None:
        """Begin a phase, or continue one that was begun before; None for no phase."""
        self._phase = phase
        self._peak = sum(self.peaks[phase].values()) if phase in self.peaks else -1
        self._note(0)

    def assign(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count the storages of these tensors as this kind, also if they were counted as another before."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            key = id(storage)
            if key not in self._kinds:
                self._add(storage, kind)
            elif self._kinds[key] != kind:
                size = self._owners[key][1]
                self.alive[self._kinds[key]] -= size
                self.alive[kind] += size
                self._kinds[key] = kind
        self._note(0)

    def adjust(self, kind: str, size: int) -> None:
        """Add bytes that belong to no tensor; a negative ``size`` removes them."""
        self.alive[kind] += size
        self._total += size
        self._note(0)

    def adjust_all(self, sizes: Mapping[str, int]) -> None:
        """Add bytes that belong to no tensor, by kind."""
        for kind, size in sizes.items():
            self.adjust(kind, size)

    @property
    def phase(self) -> str | None:
        """The phase that has begun; None for none."""
        return self._phase

    def restart_phase(self) -> dict[str, int]:
        """Forget the peak of the phase so far, and return it."""
        assert self._phase is not None
        peak = self.peaks.pop(self._phase)
        self.begin(self._phase)
        return peak

    def merge_peak(self, phase: str, peak: dict[str, int], first: bool = False) -> None:
        """Let a phase have had this peak too.

        Args:
            phase: The phase.
            peak: Bytes by kind.
            first: Whether it came before the peak that the phase has; of equal peaks the first counts. Defaults to False.
        """
        known = self.peaks.get(phase)
        size = sum(peak.values())
        if known is None or size > sum(known.values()) or (first and size == sum(known.values())):
            self.peaks[phase] = peak
            if phase == self._phase:
                self._peak = size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is DEVICE_OF:
            return args[0].device
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return _value(func, args)
        made = func(*args, **kwargs)
        new = 0
        for leaf in made if isinstance(made, tuple | list) else (made,):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in self._kinds:
                    new += self._add(storage, self.kind)
        self._note(self.inside(func, args, made))
        if self._phase is not None:
            self._count_work(func, args, kwargs, made, new)
        return made

    def _add(self, storage: Any, kind: str) -> int:
        key, steps = id(storage), self.granularity
        size = -(-int(storage.nbytes()) // steps) * steps

        def dead(_: object) -> None:
            del self._owners[key]
            self.alive[self._kinds.pop(key)] -= size
            self._total -= size

        self._owners[key] = weakref.ref(storage, dead), size
        self._kinds[key] = kind
        self.alive[kind] += size
        self._total += size
        return size

    def _note(self, inside: int) -> None:
        if self._phase is not None and self._total + inside > self._peak:
            self._peak = self._total + inside
            self.peaks[self._phase] = {**self.alive, "other": self.alive["other"] + inside}

    def _count_work(self, func: Any, args: tuple[Any, ...], kwargs: Any, made: Any, new: int) -> None:
        count = _FLOPS.get(func.overloadpacket)
        if count is None and not new:
            return  # a view, or a change in place of something small
        inputs = [arg for arg in args if isinstance(arg, Tensor)]
        flops = int(count(*args, **kwargs, out_val=made)) if count else 0
        read = sum(tensor.nbytes for tensor in inputs)
        self.work.append((flops, read + new, inputs[0].element_size() if inputs else 4))


def _value(func: Any, args: tuple[Any, ...]) -> Any:
    """The value of a one-element tensor; True or 1 for a tensor without contents.

    Some adapter methods read a random number to decide whether a layer takes part in the step.
    """
    try:
        return func(*args)
    except DataDependentOutputException:
        dtype = args[0].dtype
        return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
