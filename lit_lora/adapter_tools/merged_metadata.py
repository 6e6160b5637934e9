"""What the files of merged adapters say: what all of them say, and what the result needs to be used as they were."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from lit_lora.adapter_tools.named_adapter import NamedAdapter
from lit_lora.errors import UserError
from lit_lora.formats.base_adapter import BaseAdapter
from lit_lora.formats.base_records import Records, base_metadata, base_records, same_adapters, told
from lit_lora.formats.own_metadata import OWN_PREFIX
from lit_lora.formats.sampling_scheduler import SCHEDULER_KEY

_LISTS = ("modelspec.trigger_phrase", "modelspec.tags")
"""Entries that list words, of which the result has all."""
_STATED = ("modelspec.author", "modelspec.license")
"""Entries that hold for the result, too, if only some of the adapters have them."""
_ADAPTERS = "lit_lora.base_adapters"


def merged_metadata(adapters: Sequence[NamedAdapter]) -> dict[str, str]:
    """The metadata of the merged adapter.

    Facts about a training, such as ``ss_steps``, stay if all adapters agree. What an adapter needs beside its base stays if the
    others need the same or nothing, but a scheduler only if all need the same.

    Args:
        adapters: The adapters.

    Raises:
        UserError: If they were trained over different adapters, which are not all merged with their weights, or were made for
            different quantizations or schedulers.
    """
    entries = [one.adapter.metadata for one in adapters]
    merged = {name: value for name, value in entries[0].items() if all(one.get(name) == value for one in entries)}
    for name in _LISTS:
        words = dict.fromkeys(word for one in entries for word in one.get(name, "").split(", ") if word)
        merged |= {name: ", ".join(words)} if words else {}
    own = sorted({name for one in entries for name in one if name.startswith(OWN_PREFIX)} - {_ADAPTERS})
    for name in (*own, *_STATED):
        # An adapter that names no scheduler was trained for the base's own.
        tell = [one for one in adapters if name in one.adapter.metadata or name == SCHEDULER_KEY]
        values = {one.adapter.metadata.get(name, "the base's own"): one.path for one in tell}
        if len(values) > 1:
            _refuse_or_warn(name, values)
        elif values:
            merged[name] = next(iter(values))
    merged.pop(_ADAPTERS, None)
    return merged | base_metadata(needed_adapters(adapters))


def needed_adapters(adapters: Sequence[NamedAdapter]) -> Records:
    """The adapters that the result has to be used over: those of its training that are not merged with their weights.

    Args:
        adapters: The adapters, whose paths are read again if one was trained over others.

    Raises:
        UserError: If these are others for each adapter.
    """
    needs = [base_records(one.adapter.metadata) for one in adapters]
    if not any(needs):
        return []
    merged = [BaseAdapter(one.path, one.weight).record_of(one.adapter) for one in adapters if one.weight]
    remaining = [[one for one in need if not any(same_adapters([one], [here]) for here in merged)] for need in needs]
    for source, need in zip(adapters, remaining, strict=True):
        if not same_adapters(need, remaining[0]):
            raise UserError(
                f"{adapters[0].path} was trained over {told(remaining[0])}, and {source.path} over {told(need)}, beside what is "
                f"merged here: the result would fit neither base. Merge those adapters, too, with these weights"
            )
    return remaining[0]


def _refuse_or_warn(name: str, values: dict[str, str]) -> None:
    """Handle an entry of which adapters have different values, given with an adapter for each."""
    listed = " and ".join(f"{value} in {path}" for value, path in values.items())
    if name in ("lit_lora.quantized_base", SCHEDULER_KEY):
        raise UserError(f"the adapters need different bases: {name} is {listed}; merge adapters of one kind of base")
    warnings.warn(f"the merged adapter does not say {name}, which is {listed}", stacklevel=4)
