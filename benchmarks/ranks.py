"""Uniform and adaptive ranks at the same number of parameters: ``python -m benchmarks.ranks``.

The embedded base learns two sets of images: scikit-learn's scans of handwritten digits, and shapes filled with patterns, which
the base has only seen in one colour. They are cached, so that a run can take enough steps to need its rank. Every setting
trains with the same steps, batches and seeds; the budgets are the parameters of uniform LoRA at its rank, and at half of it.
Accuracy is the share of generated images in which a support vector machine, trained on images of the set only, recognises
what the prompt asks for. The validation loss is computed on held-out images at fixed timesteps and noise. ``most MB`` counts
weights, gradients and optimizer state of the adapter at their largest, ``last MB`` at the end. ``s`` is CPU time.

Every run adds a line to the JSON file, and a run that is in it is not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from peft import AdaLoraConfig, LoraConfig, PeftConfig
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from benchmarks.environment import cpu_cores, versions
from benchmarks.learning import data_of, learn
from lit_lora import EvaInitialization, LoraDiffusion, ParameterGroup, RankBudget, StableDiffusion
from lit_lora.adapters import ADAPTER_NAME, adapter_state, method_of, plain_config
from lit_lora.datamodules.packing.pack import pack_folder
from lit_lora.tools.cache import cache_shards
from lit_lora.tools.demo import GUIDANCE_SCALE, INFERENCE_STEPS, SCAN_SIZE, _fit_classifier, _prompt, _scan_images
from scripts.embedded.drawing import SHAPES, SIZE, _draw_shape

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]
PATTERNS = ("striped", "dotted", "checkered", "hollow")
BATCH = 16
RATES = {"digits": 2e-3, "shapes": 4e-3}
"""Sets of images, with the learning rate of A: the best of three for uniform LoRA of rank 4, each twice the one before."""
PARAMETERS_PER_RANK = 36_592
"""Parameters of uniform LoRA in these layers of the embedded base, for each rank."""


@dataclass(frozen=True)
class Task:
    """A set of images with prompts, and a classifier that tells which prompt an image shows.

    Args:
        images: Images to learn.
        captions: Captions of the images.
        prompts: One prompt for each class.
        features: Function from an image to what the classifier sees.
        classifier: Classifier of the features.
        accuracy: Accuracy of the classifier on images of the set that it has not seen.
    """

    images: list[Image.Image]
    captions: list[str]
    prompts: list[str]
    features: Callable[[Image.Image], np.ndarray]
    classifier: SVC
    accuracy: float


def digits() -> Task:
    """Scans of handwritten digits."""
    scans, labels = load_digits(return_X_y=True)
    classifier, accuracy = _fit_classifier(scans, labels)

    def features(image: Image.Image) -> np.ndarray:
        small = image.convert("L").resize((SCAN_SIZE, SCAN_SIZE), Image.Resampling.BOX)
        return np.asarray(small).reshape(-1) * (16 / 255)

    return Task(
        _scan_images(scans),
        [_prompt(digit) for digit in labels],
        [_prompt(digit) for digit in range(10)],
        features,
        classifier,
        accuracy,
    )


def shapes(count: int = 1800) -> Task:
    """Shapes filled with patterns, white on black."""
    rng = np.random.default_rng(0)
    names = [f"a {pattern} {shape}" for pattern in PATTERNS for shape in SHAPES]
    labels = [number % len(names) for number in range(count)]
    images = [_patterned(names[label].split()[1], names[label].split()[2], rng) for label in labels]

    def features(image: Image.Image) -> np.ndarray:
        return np.asarray(image.convert("L").resize((SIZE, SIZE))).reshape(-1) / 255

    seen = np.stack([features(image) for image in images])
    half = len(names) * (count // len(names) // 2)
    classifier = SVC(C=10.0).fit(seen[:half], labels[:half])
    accuracy = float(classifier.score(seen[half:], labels[half:]))
    return Task(images, [names[label] for label in labels], names, features, classifier, accuracy)


def _patterned(pattern: str, shape: str, rng: np.random.Generator) -> Image.Image:
    """A shape with a pattern, with random place, size and phase."""
    canvas = 128
    outline = Image.new("L", (canvas, canvas), 0)
    center = tuple(canvas / 2 + rng.uniform(-5, 5, size=2))
    radius = float(rng.uniform(48, 56))
    _draw_shape(ImageDraw.Draw(outline), shape, center, radius)
    y, x = np.mgrid[:canvas, :canvas] + rng.integers(0, 8, size=2)[:, None, None]
    fill = {
        "striped": (y // 12) % 2 == 0,
        "dotted": ((x % 20 - 10) ** 2 + (y % 20 - 10) ** 2) < 36,
        "checkered": ((x // 16) + (y // 16)) % 2 == 0,
        "hollow": np.zeros((canvas, canvas), dtype=bool),
    }[pattern]
    inner = Image.new("L", (canvas, canvas), 0)
    _draw_shape(ImageDraw.Draw(inner), shape, center, radius * 0.72)
    inside, border = np.asarray(inner) > 0, (np.asarray(outline) > 0) & ~(np.asarray(inner) > 0)
    pixels = np.where(border, 255, np.where(inside & fill, 230, np.where(inside, 40, 0))).astype(np.uint8)
    return Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BOX).convert("RGB")


@dataclass(frozen=True)
class Setting:
    """An adapter and the callbacks that go with it."""

    adapter: Callable[[int], PeftConfig]
    callbacks: Callable[[], list[Callback]] = list
    lr_ratio: float | None = None
    """Learning rate of B over that of A, where it is not that of all settings."""
    lr_factor: float = 1.0
    """Learning rate over that of the other settings."""
    singular_lr_ratio: float | None = None
    """Learning rate of AdaLoRA's singular values over that of its other tensors; None for other methods."""


def settings(rank: int, start: int) -> dict[str, Setting]:
    """The settings by name.

    Args:
        rank: Rank of uniform LoRA, which sets the budget.
        start: Rank with which pruned LoRA starts.
    """

    def uniform(r: int) -> Setting:
        # rsLoRA's scale, 1 at the rank of the budget, so that one learning rate suits all ranks.
        alpha = math.sqrt(rank)
        return Setting(lambda steps: LoraConfig(r=r, lora_alpha=alpha, use_rslora=True, target_modules=TARGETS))

    def eva(r: int) -> Setting:
        return Setting(uniform(r).adapter, lambda: [EvaInitialization()])

    def pruned(r: int) -> Setting:
        return Setting(uniform(start).adapter, lambda: [RankBudget(parameters=PARAMETERS_PER_RANK * r)])

    def adalora(r: int) -> Setting:
        return Setting(
            lambda steps: AdaLoraConfig(
                init_r=r * 3 // 2,
                target_r=r,
                lora_alpha=math.sqrt(rank * (r * 3 // 2)),  # rsLoRA's scale
                tinit=steps // 10,
                tfinal=steps * 2 // 5,
                deltaT=max(1, steps // 40),
                total_step=steps,
                target_modules=TARGETS,
            ),
            # A of AdaLoRA does not wait for B, so that both have one rate. They begin 30 times smaller than A of LoRA, and E,
            # which scales them, at zero: with their rate for E too it learns little in so few steps (34 % of digits at 4e-3; 51,
            # 83 and 91 % at 1e-3 with 30, 100 and 300 times their rate for E, and 96 % at 4e-3 with 100 times).
            lr_ratio=1.0,
            lr_factor=2.0,
            singular_lr_ratio=100.0,
        )

    return {
        f"uniform r={rank}": uniform(rank),
        f"RankBudget {start} -> {rank}": pruned(rank),
        f"AdaLoRA {rank * 3 // 2} -> {rank}": adalora(rank),
        f"EVA {rank}": eva(rank),
        f"uniform r={rank // 2}": uniform(rank // 2),
        f"RankBudget {start} -> {rank // 2}": pruned(rank // 2),
        f"AdaLoRA {rank * 3 // 4} -> {rank // 2}": adalora(rank // 2),
    }


def _run(
    setting: Setting, seed: int, shards: Path, task: Task, lr: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Train with one setting and one seed, and measure the result."""
    seed_everything(seed, verbose=False)
    steps = options.steps
    groups = [ParameterGroup("*.lora_B*", lr_ratio=setting.lr_ratio or options.lr_ratio)]
    if setting.singular_lr_ratio is not None:
        groups.append(ParameterGroup("*.lora_E*", lr_ratio=setting.singular_lr_ratio))
    module = LoraDiffusion(
        StableDiffusion("embedded"),
        setting.adapter(steps),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr * setting.lr_factor),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps),
        parameter_groups=groups,
        caption_dropout=0.1,
        seed=seed,
    )
    held = _Held()
    learned = learn(module, data_of(shards, seed, BATCH), steps, [*setting.callbacks(), held])
    rounds = options.images // len(task.prompts)
    images = module.generate(
        task.prompts * rounds,
        seeds=range(rounds * len(task.prompts)),
        num_inference_steps=INFERENCE_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        batch_size=50,
    )
    seen = np.stack([task.features(image) for image in images])
    labels = list(range(len(task.prompts))) * rounds
    state, config = _files(module.family.denoiser)
    ranks = [*config["rank_pattern"].values()] or [config["r"]]
    return {
        "accuracy": float(task.classifier.score(seen, labels)),
        "loss": learned.loss,
        "parameters": sum(value.numel() for value in state.values()),
        "most_bytes": held.most,
        "last_bytes": held.last,
        "ranks": [min(ranks), max(ranks)],
        "seconds": learned.seconds,
    }


class _Held(Callback):
    """Bytes of weights, gradients and optimizer state of the adapter."""

    most = 0
    last = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        states = [value for one in trainer.optimizers[0].state.values() for value in one.values()]
        state = sum(value.nbytes for value in states if torch.is_tensor(value))
        self.last = 2 * sum(p.nbytes for p in trained) + state
        self.most = max(self.most, self.last)


def _files(model: Any) -> tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]:
    """Tensors and config of the adapter's files."""
    config = model.peft_config[ADAPTER_NAME]
    return method_of(config).export(model, adapter_state(model), plain_config(config))


def _pack(task: Task, out: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        for number, (image, caption) in enumerate(zip(task.images, task.captions, strict=True)):
            image.save(Path(name) / f"{number:04d}.png")
            (Path(name) / f"{number:04d}.txt").write_text(caption, encoding="utf-8")
        pack_folder(name, out / "shards", samples_per_shard=600)
    module = LoraDiffusion(StableDiffusion("embedded"), LoraConfig(r=1, target_modules=TARGETS))
    cache_shards(module, data_of(out / "shards", 0), str(out / "cache"), dtype="float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=240, help="images to generate and classify, at most")
    parser.add_argument("--lr-ratio", type=float, default=8.0, help="learning rate of B over that of A (LoRA+)")
    parser.add_argument("--rank", type=int, default=4, help="rank of uniform LoRA, whose parameters are the budget")
    parser.add_argument("--start", type=int, default=16, help="rank with which RankBudget starts")
    parser.add_argument("--tasks", nargs="*", choices=RATES, default=[*RATES], help="sets of images")
    parser.add_argument("--only", nargs="*", help="parts of the names of the settings to run")
    parser.add_argument("--json", type=Path, default=Path("ranks.json"), help="file with the runs so far")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    done: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    tasks = {name: {"digits": digits, "shapes": shapes}[name]() for name in options.tasks}
    with tempfile.TemporaryDirectory() as folder:
        for task_name, task in tasks.items():
            shards = Path(folder) / task_name
            _pack(task, shards)
            for seed in options.seeds:
                for name, setting in settings(options.rank, options.start).items():
                    key = f"{task_name}/{name}/{seed}/{options.steps}"
                    if key in done or (options.only and not any(part in key for part in options.only)):
                        continue
                    done[key] = _run(setting, seed, shards / "cache", task, RATES[task_name], options)
                    options.json.write_text(json.dumps(done, indent=1))
                    print(key, done[key], flush=True)
    print(_table(tasks, done, options))


def _table(tasks: dict[str, Task], done: dict[str, Any], options: argparse.Namespace) -> str:
    lines = [
        f"batches of {BATCH} images, LoRA+ with {options.lr_ratio:g} times the rate for B, except in AdaLoRA; seeds "
        f"{options.seeds}; {cpu_cores()}, {torch.get_num_threads()} threads; {versions('torch', 'peft', 'lightning')}"
    ]
    for task_name, task in tasks.items():
        lines += [
            "",
            f"{task_name}, {options.steps} steps at {RATES[task_name]:g}: the classifier reads {task.accuracy:.1%} of unseen "
            "images",
            f"{'':<22}{'accuracy':>9} {'(each seed)':<20}{'val loss':>9} {'- uniform':>10} {'(each seed)':<25}"
            f"{'parameters':>11}{'ranks':>8}{'most MB':>9}{'last MB':>9}{'s':>6}",
        ]
        rank = options.rank
        for name in settings(rank, options.start):
            keys = [f"{task_name}/{name}/{seed}/{options.steps}" for seed in options.seeds]
            runs = [done[key] for key in keys if key in done]
            if not runs:
                continue
            mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0] if key != "ranks"}
            # Each seed holds out other images, so that losses compare within a seed alone.
            same = next(uniform for uniform in (rank, rank // 2) if name.endswith((f"={uniform}", f" {uniform}")))
            pairs = [(key, key.replace(name, f"uniform r={same}")) for key in keys if key in done]
            less = [done[key]["loss"] - done[other]["loss"] for key, other in pairs if other in done]
            each = " ".join(f"{run['accuracy']:.1%}" for run in runs)
            ranks = f"{min(run['ranks'][0] for run in runs)}-{max(run['ranks'][1] for run in runs)}"
            lines.append(
                f"{name:<22}{mean['accuracy']:>9.1%} {each:<20}{mean['loss']:>9.4f} {statistics.mean(less):>+10.4f} "
                f"{' '.join(f'{one:+.4f}' for one in less):<25}"
                f"{mean['parameters']:>11,.0f}{ranks:>8}{mean['most_bytes'] / 1e6:>9.1f}{mean['last_bytes'] / 1e6:>9.1f}"
                f"{mean['seconds']:>6.0f}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
