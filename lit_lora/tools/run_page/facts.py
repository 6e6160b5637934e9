"""What a run has left in its folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lit_lora.redact import redact_urls
from lit_lora.tools.run_page import PLAN
from lit_lora.tools.run_page.scalars import Curves, read_curves
from lit_lora.tools.run_page.versions import best_of, earlier_versions, first_step, join, resumed_from
from lit_lora.tools.training.results import best_adapter


@dataclass
class RunFacts:
    """What is known of a run; parts that it did not leave are empty.

    Args:
        folder: Folder of the run.
        report: Contents of ``report.json``, which :class:`~lit_lora.callbacks.RunReport` writes.
        memory: Contents of ``memory.json``, which :class:`~lit_lora.callbacks.MemoryProfiler` writes.
        plan: The planned memory: see :meth:`~lit_lora.planning.memory_plan.MemoryPlan.write`.
        curves: Logged scalars, with those of the versions that this one was resumed from.
        config: The run's config.
        config_text: The same as text, without passwords in URLs.
        samples: Grids of samples by step, likewise.
        adapter: Folder of the adapter to use: the best of all these versions, or the last.
        card: Text of its model card.
        notes: What could not be read.
    """

    folder: Path
    report: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    samples: dict[int, Path] = field(default_factory=dict)
    adapter: Path | None = None
    card: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the run, with its version."""
        folder = self.folder.resolve()
        if folder.parent.name != "lightning_logs":
            return folder.name
        return f"{folder.parent.parent.name}, {folder.name.replace('_', ' ')}"

    def setting(self, path: str) -> Any:
        """The value at a dotted path of the config; None if there is none."""
        value: Any = self.config
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def callback(self, name: str) -> Mapping[str, Any]:
        """Options of the first callback of this class in the config; empty if there is none."""
        callbacks = self.setting("trainer.callbacks")
        for one in callbacks if isinstance(callbacks, list) else []:
            if isinstance(one, Mapping) and str(one.get("class_path")).rpartition(".")[2] == name:
                return one.get("init_args") or {}
        return {}


def read_run(folder: Path) -> RunFacts:
    """Read what a run has left in its folder.

    Args:
        folder: Folder of the run.
    """
    facts = RunFacts(folder)
    facts.report, facts.memory = _object(facts, folder / "report.json"), _object(facts, folder / "memory.json")
    plans = [folder / PLAN, folder.parent.parent / PLAN]
    facts.plan = next((plan for path in plans if (plan := _object(facts, path))), {})
    versions = [*earlier_versions(folder), folder]
    curves = [read_curves(one, facts.notes) for one in versions]
    facts.curves = join(curves)
    facts.config_text = redact_urls(_text(facts, folder / "config.yaml"))
    try:
        config = yaml.safe_load(facts.config_text)
        facts.config = config if isinstance(config, dict) else {}
    except yaml.YAMLError as error:
        facts.notes.append(f"config.yaml cannot be read: {error}")
    if reason := facts.report.get("stopped_early"):
        facts.notes.append(f"early stopping has ended the run: {reason}")
    facts.notes += [*_origin(versions, curves), *_stale(facts)]
    for path in (path for one in versions for path in sorted(one.glob("samples/step-*.png"))):
        if found := re.fullmatch(r"step-(\d+)", path.stem):
            facts.samples[int(found[1])] = path
    last = folder / "checkpoints" / "last.adapter"
    best = [adapter for one in versions if (adapter := best_adapter(one)) is not None]
    losses = facts.curves.get("val/loss", [])
    facts.adapter = best_of(best, losses) if best else last if last.is_dir() else None
    if facts.adapter is not None:
        facts.card = _text(facts, facts.adapter / "README.md")
    return facts


def _origin(versions: Sequence[Path], curves: Sequence[Curves]) -> list[str]:
    """What a resumed run's page shows of the versions before, and what it does not."""
    resumed = resumed_from(versions[0])
    notes = []
    if resumed not in (None, "last") and (start := first_step(curves[0])) < float("inf"):
        notes.append(
            f"{versions[0].name} was resumed from {redact_urls(str(resumed))}, of which no logs are beside it: steps before "
            f"{start:,} are not shown"
        )
    if len(versions) > 1:
        starts = [
            f"{one.name} from step {first_step(each):,}" for one, each in zip(versions, curves, strict=True) if each
        ]
        notes.append(
            f"curves and samples are those of versions that were resumed one from another: {', '.join(starts)}"
        )
    return notes


def _stale(facts: RunFacts) -> list[str]:
    """That ``report.json`` was written before the logs end: by an earlier start of a run that goes on or was killed."""
    steps = (facts.report.get("total") or {}).get("optimizer_steps")
    last = max((points[-1][0] for points in facts.curves.values()), default=0)
    if not isinstance(steps, int) or last <= steps:
        return []
    return [
        f"report.json tells of {steps:,} optimizer steps, and the logs go on to step {last:,}: its status and figures are not "
        f"those of the whole run, which has been started again since, or was resumed without RunReport in its checkpoint"
    ]


def _object(facts: RunFacts, path: Path) -> Mapping[str, Any]:
    """The JSON object in a file; empty if there is none."""
    text = _text(facts, path)
    try:
        value = json.loads(text) if text else {}
    except ValueError as error:
        facts.notes.append(f"{path.name} cannot be read: {error}")
        return {}
    return value if isinstance(value, dict) else {}


def _text(facts: RunFacts, path: Path) -> str:
    """Text of a file; empty if there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError as error:
        facts.notes.append(f"{path.name} cannot be read: {error.strerror}")
        return ""
