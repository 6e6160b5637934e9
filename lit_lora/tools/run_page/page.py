"""The page of a run, as HTML that needs no other file, network or script."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from lit_lora.byte_sizes import format_bytes
from lit_lora.prompts import Prompt, read_prompts
from lit_lora.report_text import format_duration, format_option
from lit_lora.tools.run_page import PLAN
from lit_lora.tools.run_page.charts import Line, line_chart, stacked_bars
from lit_lora.tools.run_page.facts import RunFacts
from lit_lora.tools.run_page.images import image_tag
from lit_lora.tools.run_page.style import STYLE

_MOST_SAMPLES = 12
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_SETTINGS = {
    "base": "model.family.init_args.pretrained_model_name_or_path",
    "family": "model.family.class_path",
    "method": "model.adapter.class_path",
    "rank": "model.adapter.init_args.r",
    "alpha": "model.adapter.init_args.lora_alpha",
    "target modules": "model.adapter.init_args.target_modules",
    "optimizer": "model.optimizer.class_path",
    "learning rate": "model.optimizer.init_args.lr",
    "schedule": "model.lr_scheduler.class_path",
    "steps": "trainer.max_steps",
    "batch size": "data.init_args.batch_size",
    "batches per step": "trainer.accumulate_grad_batches",
    "resolution": "data.init_args.resolution",
    "base dtype": "model.base_dtype",
    "quantization": "model.quantization.class_path",
    "precision": "trainer.precision",
    "seed": "seed_everything",
}
"""Settings to show first, with their paths in the config."""


def page_of(facts: RunFacts) -> str:
    """The page; everything that comes from the run is escaped.

    Args:
        facts: What is known of the run.
    """
    sections = {
        "Loss": _loss(facts),
        "Samples": _samples(facts),
        "How to use the adapter": _usage(facts),
        "Memory": _memory(facts),
        "Ranks": _ranks(facts),
        "Other curves": _curves(facts),
        "Settings": _settings(facts),
    }
    body = "".join(f"<section><h2>{title}</h2>{text}</section>" for title, text in sections.items())
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in facts.notes)
    name = escape(facts.name)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><style>{STYLE}</style></head>'
        f"<body><h1>{name}</h1>{_tiles(facts)}{notes}{body}</body></html>\n"
    )


def _tiles(facts: RunFacts) -> str:
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in _headlines(facts))
    missing = "" if facts.report else _absent("report.json", "the run is going on, was killed, or had no RunReport")
    return f'<dl class="tiles">{tiles}</dl>{missing}'


def _headlines(facts: RunFacts) -> Iterator[tuple[str, str]]:
    total: Mapping[str, Any] = facts.report.get("total") or {}
    if facts.report:
        yield "status", "stopped early" if facts.report.get("stopped_early") else str(facts.report.get("status"))
    if (steps := total.get("optimizer_steps")) is not None:
        yield "optimizer steps", f"{steps:,}"
    if (seconds := total.get("train_seconds")) is not None:
        yield "training", format_duration(seconds)
    if (rate := total.get("samples_per_second")) is not None:
        yield "images per second", f"{rate:.3g}"
    if (validation := _validation(facts))[1]:
        base, points = validation
        least = min(value for _, value in points)
        yield "least validation loss", f"{least:.4g}"
        if base:
            yield f"against {_start(facts)}", f"{least / base - 1:+.0%}"
    if parameters := facts.report.get("adapter_parameters"):
        yield "trained parameters", f"{parameters:,}"
    if peak := facts.report.get("peak_memory"):
        yield f"peak memory, {facts.report.get('peak_memory_of')}", format_bytes(peak)
    for name, what in (
        ("gpu_energy_kwh", "GPU energy, kWh"),
        ("time_cost", "cost of time"),
        ("energy_cost", "cost of energy"),
    ):
        if total.get(name) is not None:
            yield what, f"{total[name]:.3g}"


def _start(facts: RunFacts) -> str:
    """What loss and samples of step 0 are those of; an adapter that goes on from files has changed the base before."""
    method = str(facts.setting("model.adapter.class_path") or "")
    return "the adapter at the start" if method.rpartition(".")[2] == "FromFile" else "the base"


def _validation(facts: RunFacts) -> tuple[float | None, Sequence[tuple[int, float]]]:
    """The validation loss at step 0, of the base or the adapter at the start, and later ones."""
    points = facts.curves.get("val/loss", [])
    if points and points[0][0] == 0:
        return points[0][1], points[1:]
    return None, points


def _loss(facts: RunFacts) -> str:
    base, validation = _validation(facts)
    train = facts.curves.get("train/loss", [])
    if not train and not validation:
        return _absent("losses", "no logger wrote train/loss or val/loss into this folder")
    charts = []
    if validation:
        level = None if base is None else (_start(facts), base)
        charts.append(("Validation", line_chart([Line("validation loss", validation, "")], level)))
    if train:
        charts.append(("Training", line_chart([Line("training loss", train, "second")])))
    for stage, name in (("val", "Validation"), ("train", "Training")):
        if lines := _quarters(facts, stage):
            charts.append((f"{name} by noise", line_chart(lines)))
    text = _charts(charts)
    if not validation:
        text += _absent("validation loss", "set data.val_samples to hold out images")
    elif base is None:
        text += _absent("loss of the base", "the callback BaseLoss measures it before the first step")
    return text


def _quarters(facts: RunFacts, stage: str) -> list[Line]:
    """Losses by quarter of the noise schedule."""
    names = ("least noise", "second quarter", "third quarter", "most noise")
    return [
        Line(name, points, style)
        for number, (name, style) in enumerate(zip(names, ("", "third", "faint", "second"), strict=True), 1)
        if (points := facts.curves.get(f"{stage}/loss_q{number}"))
    ]


def _samples(facts: RunFacts) -> str:
    if not facts.samples:
        return _absent(
            "samples", "the callback SampleImages draws them during training; lit-lora sample draws them now"
        )
    steps = sorted(facts.samples)
    if len(steps) > _MOST_SAMPLES:  # the first, the last, and those evenly between
        steps = [steps[i * (len(steps) - 1) // (_MOST_SAMPLES - 1)] for i in range(_MOST_SAMPLES)]
    shown = []
    for step in steps:
        what = f"step {step:,}" + (f", {_start(facts)}" if step == 0 else "")
        try:
            tag = image_tag(facts.samples[step], escape(f"samples of {what}", quote=True))
        except (OSError, SyntaxError, ValueError) as error:
            tag = f'<p class="note">{escape(f"{facts.samples[step].name} cannot be read: {error}")}</p>'
        shown.append(f"<figure>{tag}<figcaption>{what}</figcaption></figure>")
    left_out = len(facts.samples) - len(steps)
    more = f"<p>{left_out} more grids are in {escape(str(facts.folder / 'samples'))}.</p>" if left_out else ""
    prompts = "".join(f"<li>{escape(str(prompt))}</li>" for prompt in _prompts(facts))
    listed = f"<p>The images of each grid, row by row from the left:</p><ol>{prompts}</ol>" if prompts else ""
    return f'<div class="samples">{"".join(shown)}</div>{more}{listed}'


def _prompts(facts: RunFacts) -> list[Prompt]:
    """Prompts of the samples; none if the config has none, or names a file that has gone."""
    options = facts.callback("SampleImages")
    prompts, seed = options.get("prompts"), options.get("seed") or 0
    try:
        return [one.filled(seed=seed + i) for i, one in enumerate(read_prompts(prompts))] if prompts else []
    except (ValueError, TypeError):
        return []


def _usage(facts: RunFacts) -> str:
    if facts.adapter is None:
        return _absent("adapter", "the callback AdapterCheckpoint writes it beside each checkpoint")
    prompt = next((one.prompt for one in _prompts(facts)), "a prompt")
    folder = shlex.quote(str(facts.adapter.parent))
    commands = [
        f"lit-lora sample --adapter {shlex.quote(str(facts.adapter))} {format_option('prompts', prompt)} --count 4",
        f"lit-lora sample --adapter {folder}/*.adapter --scales 0 0.7 1 {format_option('prompts', prompt)} --out table.png",
    ]
    text = "<p>Draw with it, and compare all checkpoints with the base:</p>" + _code("\n".join(commands))
    if found := re.search(r"```python\n(.*?)```", facts.card, re.DOTALL):
        text += "<p>In diffusers:</p>" + _code(found[1].replace('"this folder"', repr(str(facts.adapter))))
    if facts.card:
        text += f"<details><summary>The model card</summary>{_code(facts.card)}</details>"
    return text


def _memory(facts: RunFacts) -> str:
    planned, measured = facts.plan.get("phases") or {}, facts.memory.get("phases") or {}
    rows: list[tuple[str, Mapping[str, int]]] = []
    for phase in dict.fromkeys([*planned, *measured]):
        if phase in planned:
            rows.append((f"{phase}, planned", planned[phase]))
        if phase in measured:
            rows.append((f"{phase}, measured", measured[phase].get("kinds") or {}))
    peak = facts.report.get("peak_memory")
    totals: list[tuple[str, Mapping[str, int]]] = []
    if needed := facts.plan.get("needed"):
        totals.append(("needed, planned", {"": needed}))
    if peak:
        totals.append(("peak, measured", {"": peak}))
    charts = [(title, stacked_bars(bars)) for title, bars in (("The whole run", totals), ("By phase", rows)) if bars]
    text = _charts(charts)
    if planned:
        text += "<p>Planned phases are tensors alone; what is needed, and what is measured on a CPU, counts libraries too.</p>"
    if not facts.plan:
        text += _absent("plan", f"lit-lora plan --config CONFIG --json {facts.folder / PLAN} writes it")
    if not measured:
        text += _absent("measured phases", "the callback MemoryProfiler measures them")
    return text


def _ranks(facts: RunFacts) -> str:
    ranks: Mapping[str, int] = facts.report.get("adapter_ranks") or {}
    if not ranks:
        return _absent("ranks", "the callback RunReport writes those of LoRA layers")
    least, most = min(ranks.values()), max(ranks.values())
    if least == most:
        return f"<p>All {len(ranks)} layers have rank <b>{most}</b>.</p>"
    mean = sum(ranks.values()) / len(ranks)
    bars = "".join(
        f'<div><span>{escape(name)}</span><i style="width:{100 * rank / most:.1f}%"></i><b>{rank}</b></div>'
        for name, rank in ranks.items()
    )
    told = f"<p>{len(ranks)} layers have ranks from <b>{least}</b> to <b>{most}</b>, {mean:.3g} on average.</p>"
    return f'{told}<div class="ranks">{bars}</div>'


def _curves(facts: RunFacts) -> str:
    others = {
        name: points
        for name, points in sorted(facts.curves.items())
        if not re.fullmatch(r"(train|val)/loss(_q\d)?|epoch|memory_mib/.*", name) and len(points) > 1
    }
    if not others:
        return _absent("other curves", "loggers wrote none")
    return _charts([(name, line_chart([Line(name, points, "")])) for name, points in others.items()])


def _settings(facts: RunFacts) -> str:
    if not facts.config:
        return _absent("config.yaml", "lit-lora fit writes it; a script of your own keeps its settings itself")
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>"
        for name, path in _SETTINGS.items()
        if (value := facts.setting(path)) is not None
    )
    return f"<table>{rows}</table><details><summary>The whole config</summary>{_code(facts.config_text)}</details>"


def _charts(charts: Sequence[tuple[str, str]]) -> str:
    drawn = "".join(f"<div><h3>{escape(title)}</h3>{chart}</div>" for title, chart in charts)
    return f'<div class="charts">{drawn}</div>' if charts else ""


def _code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def _absent(what: str, why: str) -> str:
    return f"<p>No {escape(what)}: {escape(why)}.</p>"
