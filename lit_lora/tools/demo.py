"""``lit-lora demo``: from scans of handwritten digits to an adapter that draws them, in minutes on a CPU."""

from __future__ import annotations

import json
import resource
import shlex
import tempfile
import time
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_lora.byte_sizes import format_bytes
from lit_lora.embedded import DIGITS
from lit_lora.errors import UserError
from lit_lora.report_text import format_duration, format_next, format_reason

if TYPE_CHECKING:
    import numpy as np
    from diffusers import StableDiffusionPipeline
    from PIL import Image
    from sklearn.svm import SVC

SCAN_SIZE = 8  # edge of scikit-learn's scans, in pixels
GUIDANCE_SCALE = 2.0
INFERENCE_STEPS = 25
_MARKER = "demo.txt"


def demo(out: str = "runs/demo", steps: int = 500, images_per_digit: int = 20) -> None:
    """Train a LoRA on scikit-learn's scans of handwritten digits and measure what it learned.

    Writes these into the output folder: shards/, adapter/ (PEFT's and diffusers' files), lightning_logs/ (TensorBoard logs and
    checkpoints), samples.png (base and adapted model with the same prompts and seeds) and report.json.

    Args:
        out: Output folder. Defaults to runs/demo.
        steps: Optimizer steps with a batch of 48 images. Defaults to 500.
        images_per_digit: Images of each digit to generate and classify, before and after training. Defaults to 20.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError('the demo needs the scans that come with scikit-learn: pip install "lit_lora[demo]"') from error
    if steps < 1 or images_per_digit < 1:
        raise UserError(f"steps and images_per_digit must be at least 1, not {steps} and {images_per_digit}")
    from lit_lora.folder_lock import only_run_in

    with only_run_in(Path(out), "demo"):
        scans, digits = load_digits(return_X_y=True)
        _demo(Path(out), scans, digits, steps, images_per_digit)


def _demo(folder: Path, scans: np.ndarray, digits: np.ndarray, steps: int, images_per_digit: int) -> None:
    started = time.monotonic()
    print(f"1/4 packing {len(scans)} scans into shards under {folder / 'shards'}")
    _pack(scans, digits, folder / "shards")
    classifier, classifier_accuracy = _fit_classifier(scans, digits)

    print("2/4 generating images with the base model")
    before = _draw(_pipeline(None), images_per_digit)
    print(f"3/4 training {steps} steps")
    module = _fit(folder, steps)
    print("4/4 generating images with the adapter")
    after = _draw(_pipeline(folder / "adapter"), images_per_digit)

    report = {
        "accuracy_before": _accuracy(classifier, before),
        "accuracy_after": _accuracy(classifier, after),
        "classifier_accuracy": classifier_accuracy,
        "images_judged": len(after),
        "trainable_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "total_parameters": sum(p.numel() for p in module.parameters()),
        "adapter_bytes": (folder / "adapter" / "adapter_model.safetensors").stat().st_size,
        "steps": steps,
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    _write(folder, report, before, after, images_per_digit)
    print(_summary(folder, report))


def _pack(scans: np.ndarray, digits: np.ndarray, out: Path) -> None:
    from lit_lora.datamodules.packing.pack import pack_folder
    from lit_lora.files import atomic_folder

    with tempfile.TemporaryDirectory() as name:
        for i, (image, digit) in enumerate(zip(_scan_images(scans), digits, strict=True)):
            image.save(Path(name) / f"{i:04d}.png")
            (Path(name) / f"{i:04d}.txt").write_text(_prompt(digit), encoding="utf-8")
        with atomic_folder(out, marker=_MARKER) as part:  # replaces the shards of an earlier demo
            pack_folder(name, part, samples_per_shard=600)
            (part / _MARKER).write_text("made by lit-lora demo, which replaces this folder\n", encoding="utf-8")


def _scan_images(scans: np.ndarray) -> list[Image.Image]:
    """Convert scikit-learn's scans, ``(N, 64)`` with values from 0 to 16, to RGB images."""
    import numpy as np
    from PIL import Image

    grey = np.round(scans.reshape(-1, SCAN_SIZE, SCAN_SIZE) * (255 / 16)).astype(np.uint8)
    return [Image.fromarray(scan).convert("RGB") for scan in grey]


def _prompt(digit: int) -> str:
    return f"a handwritten {DIGITS[digit]}"


def _fit_classifier(scans: np.ndarray, digits: np.ndarray) -> tuple[SVC, float]:
    """Fit a support vector machine on every other scan; return it and its accuracy on the remaining scans."""
    from sklearn.svm import SVC

    classifier = SVC(gamma=0.001).fit(scans[::2], digits[::2])
    return classifier, float(classifier.score(scans[1::2], digits[1::2]))


def _pipeline(adapter: Path | None) -> StableDiffusionPipeline:
    """Load the pipeline with plain diffusers, so that the written adapter files are what is measured."""
    from diffusers import StableDiffusionPipeline

    from lit_lora.embedded import base_path

    pipeline = StableDiffusionPipeline.from_pretrained(base_path())
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _draw(pipeline: StableDiffusionPipeline, per_digit: int) -> list[Image.Image]:
    """Generate ``per_digit`` rounds of ten images, one of each digit from zero to nine."""
    from lit_lora.sampling import generate

    prompts = [_prompt(digit) for digit in range(10)] * per_digit
    return generate(
        pipeline,
        prompts,
        seeds=range(len(prompts)),
        num_inference_steps=INFERENCE_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        batch_size=50,
    )


def _accuracy(classifier: SVC, images: list[Image.Image]) -> float:
    """Share of the images from :func:`_draw` that the classifier recognises as the digit in the prompt."""
    import numpy as np
    from PIL import Image

    small = [image.convert("L").resize((SCAN_SIZE, SCAN_SIZE), Image.Resampling.BOX) for image in images]
    scans = np.stack([np.asarray(image) for image in small]).reshape(len(images), -1) * (16 / 255)
    return float(classifier.score(scans, np.arange(len(images)) % 10))


def _fit(folder: Path, steps: int) -> Any:
    """Train as ``lit-lora fit --config configs/demo.yaml`` does, and write the adapter's files to ``adapter``."""
    from lit_lora.lightning_cli import run
    from lit_lora.tools.training.fitting import FitCLI

    class DemoCLI(FitCLI):
        goes_on = "start lit-lora demo again"

    with as_file(files("lit_lora.configs") / "demo.yaml") as config:
        cli = run(
            [
                "fit",
                f"--config={config}",
                f"--data.init_args.train_shards={folder / 'shards'}",
                f"--trainer.default_root_dir={folder}",
                f"--trainer.max_steps={steps}",
                f"--trainer.val_check_interval={max(1, steps // 2)}",
                f"--model.lr_scheduler.init_args.T_max={steps}",
            ],
            DemoCLI,
        )
    cli.model.save_adapter(folder / "adapter")
    return cli.model


def _write(
    folder: Path, report: dict[str, Any], before: list[Image.Image], after: list[Image.Image], per_digit: int
) -> None:
    import torch
    from torchvision.utils import save_image

    from lit_lora.files import atomic_file
    from lit_lora.sampling import image_grid

    rounds = min(per_digit, 4)
    halves = [image_grid(images[: 10 * rounds], columns=10) for images in (before, after)]
    gap = torch.ones(3, halves[0].shape[1], 12)
    with atomic_file(folder / "samples.png") as part:
        save_image(torch.cat([halves[0], gap, halves[1]], dim=2), part, format="png")
    with atomic_file(folder / "report.json") as part:
        part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _summary(folder: Path, report: dict[str, Any]) -> str:
    share = report["trainable_parameters"] / report["total_parameters"]
    paragraphs = (
        f"The classifier recognised the prompted digit in {report['accuracy_before']:.0%} of {report['images_judged']} images "
        f"from the base model and in {report['accuracy_after']:.0%} with the adapter. Its accuracy on unseen scans is "
        f"{report['classifier_accuracy']:.0%}.",
        f"{report['trainable_parameters']:,} parameters ({share:.0%} of all) were trained in {report['steps']} steps; the demo "
        f"took {format_duration(report['seconds'])}. The adapter has {format_bytes(report['adapter_bytes'])}.",
    )
    adapter = f"--adapter {shlex.quote(str(folder / 'adapter'))}"
    options = f"--count 8 --guidance_scale {GUIDANCE_SCALE}"
    lines = (
        "",
        *(format_reason(paragraph, indent=0) for paragraph in paragraphs),
        "",
        f"  before and after  {folder / 'samples.png'}",
        f"  adapter           {folder / 'adapter'}",
        f"  figures           {folder / 'report.json'}",
        f"  training curves   tensorboard --logdir {folder}",
        format_next('lit-lora sample --prompts "a handwritten seven"', options, adapter),
        "",
        "or train on a folder of your own images:",
        "lit-lora train FOLDER --base sdxl",
    )
    return "\n".join(lines)
