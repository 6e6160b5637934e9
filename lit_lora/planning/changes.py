"""Changes of a config that save memory: one at a time, and the cheapest sequence that makes a run fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch

from lit_lora.adapters import method_of
from lit_lora.errors import UserError
from lit_lora.planning.denoiser_traces import DenoiserTraces
from lit_lora.planning.fake_module import unloaded
from lit_lora.planning.memory_plan import MemoryPlan
from lit_lora.planning.plan_run import plan
from lit_lora.planning.run import Run
from lit_lora.quantization import NF4, Int8

_WORTH_WHILE = 0.01
"""Share of the peak that a change must save to be suggested."""

_ENCODED = frozenset({"latents", "text"})
"""Everything that a cache can hold."""


@dataclass(frozen=True)
class Change:
    """A change of the config of a run.

    Args:
        keys: Config keys and their new values.
        price: Cost of the change in time or exactness, in a few words.
        command: Command that comes before the run, with the same config; defaults to None, for changes of the config alone.
    """

    keys: dict[str, Any]
    price: str
    command: str | None = None

    @property
    def arguments(self) -> str:
        """The change as command-line options."""
        return " ".join(f"--{key} {_shown(value)}" for key, value in self.keys.items())

    @property
    def description(self) -> str:
        """The command, if there is one, and the options."""
        if self.command is None:
            return self.arguments
        return f"{self.command}, then a run over it" + (f", both with {self.arguments}" if self.keys else "")


@dataclass(frozen=True)
class ChangedRun:
    """A change with the changed run and its plan.

    Args:
        change: Change of the config.
        run: Run with this change and, in a list of cheapest changes, all changes before it.
        plan: Plan of the changed run.
        saved: Bytes that this change saves.
    """

    change: Change
    run: Run
    plan: MemoryPlan
    saved: int


_Candidate = Callable[[Run], "tuple[Change, Run] | None"]


def cheapest_changes(
    run: Run, device_memory: int, planned: MemoryPlan | None = None, tell: Callable[[str], object] = str
) -> list[ChangedRun] | None:
    """The cheapest changes that, applied cumulatively, make a run fit; None if even all of them together do not.

    Changes are tried in the order of :data:`CANDIDATES`, cheapest first, but those that concern other phases than that of the
    peak, or too few of its bytes, come last. Those that do not help are tried again when another phase has the peak. Those
    that later changes replace or make unnecessary are left out.

    Args:
        run: Run to change.
        device_memory: Memory of the device in bytes.
        planned: Plan of ``run``, if it is known already; made here by default.
        tell: Function that is told of each change before it is planned. Defaults to one that does nothing.

    Raises:
        UserError: If the run cannot be planned: see :func:`~lit_lora.planning.plan_run.plan`.
    """
    paths = _Paths(run, planned or plan(run), tell)
    taken: tuple[_Candidate, ...] = ()
    refused: dict[_Candidate, str] = {}
    while not (planned := paths.plan(taken)).fits(device_memory):
        for candidate in _promising_first(planned, device_memory, paths.run(taken)):
            if refused.get(candidate) == planned.peak_phase:
                continue
            if longer := paths.worth_while(taken, candidate):
                taken = longer
                break
            refused[candidate] = planned.peak_phase
        else:
            return None
    for candidate in reversed(taken[:-1]):
        without = tuple(name for name in taken if name is not candidate)
        # A change that saved more than twice the remaining slack is certainly needed and need not be planned without.
        slack = device_memory - paths.plan(taken).needed
        saved = paths.saved(taken[: taken.index(candidate) + 1])
        if taken.count(candidate) > 1 or saved > 2 * slack or not paths.possible(without):
            continue
        if paths.plan(without).fits(device_memory):
            taken = without
    return [paths.changed(taken[:count]) for count in range(1, len(taken) + 1)]


def ranked_changes(run: Run, planned: MemoryPlan | None = None) -> list[ChangedRun]:
    """Changes applied one at a time, largest saving first; those that save less than 1 % of the peak are left out.

    Args:
        run: Run to change.
        planned: Plan of ``run``, if it is known already; made here by default.

    Raises:
        UserError: If the run cannot be planned: see :func:`~lit_lora.planning.plan_run.plan`.
    """
    before = planned or plan(run)
    changed = []
    for candidate in CANDIDATES:
        found = candidate(run)
        after = None if found is None else _plan_or_none(found[1])
        if found is not None and after is not None:
            changed.append(ChangedRun(*found, after, before.needed - after.needed))
    worth_while = [one for one in changed if one.saved >= _WORTH_WHILE * before.peak]
    return sorted(worth_while, key=lambda one: -one.saved)


class _Paths:
    """Plans of a run with a sequence of changes applied cumulatively; each plan is made once."""

    def __init__(self, run: Run, planned: MemoryPlan, tell: Callable[[str], object]) -> None:
        self._tell = tell
        self._plans: dict[tuple[_Candidate, ...], MemoryPlan] = {(): planned}
        self._runs: dict[tuple[_Candidate, ...], Run] = {(): run}
        self._changes: dict[tuple[_Candidate, ...], Change] = {}

    def possible(self, names: tuple[_Candidate, ...]) -> bool:
        """Whether the last change of the sequence can be applied after the others."""
        if names in self._runs:
            return True
        if not self.possible(names[:-1]):
            return False
        found = names[-1](self._runs[names[:-1]])
        if found is None:
            return False
        self._tell(f"with {found[0].description}")
        planned = _plan_or_none(found[1])
        if planned is None:
            return False
        self._changes[names], self._runs[names] = found
        self._plans[names] = planned
        return True

    def worth_while(self, names: tuple[_Candidate, ...], last: _Candidate) -> tuple[_Candidate, ...] | None:
        """The sequence with one more change, without those that this one replaces; None if that saves too little."""
        found = last(self._runs[names])
        if found is None:
            return None
        replaced = _replaced(last, found[1])
        longer = (*(name for name in names if name not in replaced), last)
        if not self.possible(longer):
            return None
        saved = self.plan(names).needed - self.plan(longer).needed
        return longer if saved >= _WORTH_WHILE * self.plan(names).peak else None

    def plan(self, names: tuple[_Candidate, ...]) -> MemoryPlan:
        assert self.possible(names)
        return self._plans[names]

    def run(self, names: tuple[_Candidate, ...]) -> Run:
        return self._runs[names]

    def saved(self, names: tuple[_Candidate, ...]) -> int:
        """Bytes that the last change of the sequence saves."""
        return self.plan(names[:-1]).needed - self.plan(names).needed

    def changed(self, names: tuple[_Candidate, ...]) -> ChangedRun:
        return ChangedRun(self._changes[names], self._runs[names], self.plan(names), self.saved(names))


def _plan_or_none(run: Run) -> MemoryPlan | None:
    """The plan, or None if the run is refused, for example because it would quantize layers that the adapter trains."""
    try:
        return plan(run)
    except UserError:
        return None


def _with_options(run: Run, encoders_only: bool = False, **options: Any) -> Run:
    """A copy of the run with other options of the module.

    Args:
        run: Run to copy.
        encoders_only: Whether the options concern only what comes before and after the denoiser. Defaults to False.
        options: Attributes of the module with their new values.
    """
    module = unloaded(run.module)
    for name, value in options.items():
        setattr(module, name, value)
    if not encoders_only:
        return replace(run, module=module, traces=DenoiserTraces())
    if any(known is run.module for known in run.traces.modules):
        run.traces.modules.append(module)
    return replace(run, module=module)


def _memory_option(
    name: str, price: str, applies: Callable[[Run], bool] = lambda run: True, encoders_only: bool = False
) -> _Candidate:
    """A candidate that turns a memory option on if it is off and applies to the run."""

    def candidate(run: Run) -> tuple[Change, Run] | None:
        if getattr(run.module.memory, name) or not applies(run):
            return None
        on: dict[str, Any] = {name: True}
        changed = _with_options(run, encoders_only, memory=replace(run.module.memory, **on))
        memory = changed.module.memory
        changed.module.family.split_vae(memory.vae_slicing, memory.vae_tiling)
        return Change({f"model.memory.{name}": True}, price), changed

    return candidate


def _uses_vae(run: Run) -> bool:
    return "latents" not in run.cached or run.sampling is not None


def _encodes_several(run: Run) -> bool:
    trains = "latents" not in run.cached and run.batch_size > 1
    return trains or (run.sampling is not None and run.sampling.images > 1)


def _uses_text_encoders(run: Run) -> bool:
    """Whether the run has text encoders that may be quantized: a cache that exists was made with them as they are."""
    if "text" in run.cached:
        return run.sampling is not None and "text" in run.cacheable
    return True


def _encodes_on_gpu(run: Run) -> bool:
    return _on_gpu(run) and not run.cached >= _ENCODED


def _on_gpu(run: Run) -> bool:
    return run.device.is_cuda and run.processes.count == 1


def _steps_in_backward(run: Run) -> bool:
    clips = run.gradient_clip_val is not None
    alone = run.processes.count == 1 and not any(method_of(one).whole_gradients for one in run.module.adapter_configs)
    return alone and not clips and run.accumulate_grad_batches == 1 and run.precision != "16-mixed"


def _int8(run: Run) -> tuple[Change, Run] | None:
    return _stored(run, Int8, "errors up to 1/254 of a channel's largest weight; some time")


def _nf4(run: Run) -> tuple[Change, Run] | None:
    return _stored(run, NF4, "base weights rounded to 16 levels; some time")


def _stored(run: Run, kind: Any, price: str) -> tuple[Change, Run] | None:
    stored = type(run.module.quantization).__name__
    if stored in ("NF4", kind.__name__) or (stored in ("FP8", "W8A8") and kind is Int8):
        return None
    change = Change({"model.quantization": f"lit_lora.quantization.{kind.__name__}"}, price)
    return change, _with_options(run, quantization=kind())


def _int8_text(run: Run) -> tuple[Change, Run] | None:
    return _stored_text(run, Int8, "slightly other text embeddings, also for lit-lora cache")


def _nf4_text(run: Run) -> tuple[Change, Run] | None:
    return _stored_text(run, NF4, "text encoders rounded to 16 levels, also for lit-lora cache")


def _stored_text(run: Run, kind: Any, price: str) -> tuple[Change, Run] | None:
    stored = type(run.module.memory.text_encoder_quantization).__name__
    if not _uses_text_encoders(run) or stored in ("NF4", kind.__name__) or (stored in ("FP8", "W8A8") and kind is Int8):
        return None
    key = "model.memory.text_encoder_quantization"
    changed = _with_options(run, True, memory=replace(run.module.memory, text_encoder_quantization=kind()))
    changed.module.family.text_quantization = changed.module.memory.text_encoder_quantization
    return Change({key: f"lit_lora.quantization.{kind.__name__}"}, price), changed


def _cache(run: Run) -> tuple[Change, Run] | None:
    kinds = run.cacheable - run.cached - ({"text"} if run.module.text_training else set())
    if not kinds:
        return None
    command = "lit-lora cache" + ("" if kinds | run.cached >= _ENCODED else " --text false")
    price = "encoding all samples once; disk space" + ("; center crops" if run.cache_keys else "")
    return Change(dict(run.cache_keys), price, command), replace(run, cached=run.cached | kinds)


def _eight_bit_optimizer(run: Run) -> tuple[Change, Run] | None:
    made: Any = run.module.optimizer([torch.nn.Parameter(torch.zeros(1))])
    if type(made) is not torch.optim.AdamW or find_spec("bitsandbytes") is None or run.processes.shards:
        return None
    from bitsandbytes.optim import AdamW8bit

    options = {name: made.defaults[name] for name in ("lr", "betas", "eps", "weight_decay")}
    change = Change({"model.optimizer": "bitsandbytes.optim.AdamW8bit"}, "optimizer state in 8 bits")
    return change, _with_options(run, optimizer=lambda parameters: AdamW8bit(parameters, **options))


def _half_batch(run: Run) -> tuple[Change, Run] | None:
    if run.batch_size % 2 or run.module.memory.optimizer_in_backward:
        return None
    half, twice = run.batch_size // 2, run.accumulate_grad_batches * 2
    keys = {"data.init_args.batch_size": half, "trainer.accumulate_grad_batches": twice}
    return Change(keys, "the same gradients in more time"), replace(run, batch_size=half, accumulate_grad_batches=twice)


def _half_rank(run: Run) -> tuple[Change, Run] | None:
    field = method_of(run.module.adapter).rank_field
    rank = None if field is None else getattr(run.module.adapter, field, None)
    # A saved adapter has the ranks that it has.
    if field is None or not isinstance(rank, int) or rank < 2 or run.module.saved is not None:
        return None
    changed = _with_options(run)
    setattr(changed.module.adapter, field, rank // 2)
    return Change({f"model.adapter.init_args.{field}": rank // 2}, "an adapter with less capacity"), changed


_vae_slicing = _memory_option("vae_slicing", "almost none", _encodes_several, True)
_vae_tiling = _memory_option("vae_tiling", "slightly different latents", _uses_vae, True)
_offload_encoders = _memory_option("offload_encoders", "copying the encoders in each step", _encodes_on_gpu, True)

_checkpointing = _memory_option("gradient_checkpointing", "a third more time")
_offload_activations = _memory_option("offload_activations", "copying activations in each step", _on_gpu)

CANDIDATES: tuple[_Candidate, ...] = (
    _vae_slicing,
    _offload_encoders,
    _checkpointing,
    _cache,
    _memory_option("optimizer_in_backward", "no clipping by norm, no gradient accumulation", _steps_in_backward),
    _eight_bit_optimizer,
    _half_batch,
    _int8_text,
    _int8,
    _vae_tiling,
    _offload_activations,
    _nf4_text,
    _nf4,
    _memory_option("offload_blocks", "copying the base twice in each step", _on_gpu),
    _half_rank,
)
"""All changes, cheapest first: those that keep the result and take little time, those that only take time, those that store the
base less exactly or copy much data in each step, and finally the one that trains another adapter."""


def _promising_first(planned: MemoryPlan, device_memory: int, run: Run) -> list[_Candidate]:
    """All changes in their order, but last those that hardly change the peak, or certainly too little by themselves."""
    last: list[_Candidate] = []
    if planned.peak_phase not in ("forward", "backward"):
        last += [_checkpointing, _offload_activations]
    if planned.peak_phase == "sampling" and run.sampling:
        last += [_cache, _half_batch]  # its images are drawn with all parts
    if planned.at_peak("optimizer state") < planned.needed - device_memory:
        last += [_eight_bit_optimizer]
    return sorted(CANDIDATES, key=last.__contains__)


def _replaced(last: _Candidate, changed: Run) -> tuple[_Candidate, ...]:
    """Changes that have no effect beside this one in the changed run."""
    if last is _nf4:
        return (_int8,)
    if last is _nf4_text:
        return (_int8_text,)
    if last is _cache and changed.cached >= _ENCODED:
        # Sample images still need VAE and text encoders, all at once.
        only_in_training = (_vae_slicing, _vae_tiling, _int8_text, _nf4_text)
        return (_offload_encoders, *(() if changed.sampling else only_in_training))
    return ()


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
