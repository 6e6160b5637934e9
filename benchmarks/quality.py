"""How well each setting learns handwritten digits: ``python -m benchmarks.quality``.

The embedded base is trained on scikit-learn's scans as in ``lit-lora demo``: with full fine-tuning, with LoRA, and with the
recipe of docs/quality.md, LoRA+, on a dense base and on each quantization, with the same steps, batches and seeds. Then each
model generates digits. Accuracy is the share of images in which a support vector machine, trained on scans only, recognises the
digit in the prompt. The validation loss is computed on held-out scans at fixed timesteps and noise. Memory counts the denoiser's
weights, the gradients and the optimizer state.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, seed_everything
from peft import LoraConfig
from sklearn.datasets import load_digits

import lit_lora.quantization
from benchmarks.learning import data_of, learn
from benchmarks.selection import selected
from lit_lora import LoraDiffusion, ParameterGroup, StableDiffusion
from lit_lora.families.checks import prepare
from lit_lora.tools.demo import GUIDANCE_SCALE, INFERENCE_STEPS, _accuracy, _fit_classifier, _pack, _prompt

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]
FULL = "full fine-tuning, fp32"
SETTINGS: dict[str, dict[str, Any]] = {
    FULL: {"full": True},
    "LoRA, fp32 base": {"base_dtype": "float32", "ratio": 1.0},
    "LoRA+, fp32 base": {"base_dtype": "float32"},
    "LoRA+, bf16 base": {},
    "LoRA+, int8 base": {"quantization": "Int8"},
    "LoRA+, w8a8 base": {"quantization": "W8A8"},
    "LoRA+, fp8 base": {"quantization": "FP8"},
    "LoRA+, nf4 base": {"quantization": "NF4"},
}


class FullFineTuning(LoraDiffusion):
    """Training of the whole denoiser without an adapter, with the same training step."""

    def configure_model(self) -> None:
        if self._configured:
            return
        self._scheduler_config = prepare(self.family, self.objective)
        self.family.load(torch.float32)
        self.family.denoiser.requires_grad_(True)
        self.family.train()
        self._configured = True

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        LightningModule.optimizer_step(self, *args, **kwargs)  # without the adapter method's work after each step


def _module(setting: dict[str, Any], seed: int, steps: int, options: argparse.Namespace) -> LoraDiffusion:
    full = setting.get("full", False)
    rate = options.full_lr if full else options.lr

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)

    keys = {key: value for key, value in setting.items() if key not in ("full", "ratio")}
    if "quantization" in keys:
        keys["quantization"] = getattr(lit_lora.quantization, keys["quantization"])()
    if full:
        keys["base_dtype"] = "float32"
    else:
        keys["parameter_groups"] = [ParameterGroup("*.lora_B.*", lr_ratio=setting.get("ratio", options.lr_ratio))]
    return (FullFineTuning if full else LoraDiffusion)(
        StableDiffusion("embedded"),
        LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=rate),
        lr_scheduler=schedule,
        caption_dropout=0.1,
        seed=seed,
        **keys,
    )


def _run(
    setting: dict[str, Any], seed: int, shards: Path, classifier: Any, options: argparse.Namespace
) -> dict[str, float]:
    """Train with one setting and one seed, and measure the result."""
    seed_everything(seed, verbose=False)
    module = _module(setting, seed, options.steps, options)
    learned = learn(module, data_of(shards, seed), options.steps)
    denoiser = list(module.family.denoiser.parameters())
    trained = [parameter for parameter in denoiser if parameter.requires_grad]
    state = [
        value
        for entry in learned.trainer.optimizers[0].state.values()
        for value in entry.values()
        if torch.is_tensor(value)
    ]
    held = sum(t.numel() * t.element_size() for t in (*denoiser, *trained, *state))
    prompts = [_prompt(digit) for digit in range(10)] * options.images_per_digit
    images = module.generate(
        prompts,
        seeds=range(len(prompts)),
        num_inference_steps=INFERENCE_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        batch_size=50,
    )
    return {
        "accuracy": _accuracy(classifier, images),
        "loss": learned.loss,
        "bytes": held,
        "trained": sum(parameter.numel() for parameter in trained),
        "seconds": learned.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument(
        "--images-per-digit", type=int, default=20, help="images of each digit to generate and classify"
    )
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of the adapters")
    parser.add_argument("--lr-ratio", type=float, default=8.0, help="learning rate of B over that of A in LoRA+")
    parser.add_argument("--full-lr", type=float, default=5e-4, help="learning rate of full fine-tuning")
    parser.add_argument("--only", nargs="*", help="names of settings to run, or parts of them")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    scans, digits = load_digits(return_X_y=True)
    classifier, on_scans = _fit_classifier(scans, digits)
    print(
        f"{options.steps} steps of 48 images, seeds {options.seeds}, {10 * options.images_per_digit} images judged each; the"
        f" classifier reads {on_scans:.1%} of unseen scans; torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    print(
        f"{'':<24}{'accuracy':>9}{'of full':>9} {'(each seed)':<20}{'val loss':>9}{'trained':>11}{'MB':>7}{'s':>6}"
        f"{'of full':>9}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        _pack(scans, digits, shards)
        names = selected(SETTINGS, options.only)
        # Seed by seed, so that what else the machine does falls on all settings alike.
        runs: dict[tuple[str, int], dict[str, float]] = {}
        for seed, name in itertools.product(options.seeds, names):
            runs[name, seed] = _run(SETTINGS[name], seed, shards, classifier, options)
            print(f"{name}, seed {seed}: {runs[name, seed]}", file=sys.stderr, flush=True)
    means = {
        name: {
            key: statistics.mean(runs[name, seed][key] for seed in options.seeds)
            for key in runs[name, options.seeds[0]]
        }
        for name in names
    }
    for name, mean in means.items():
        each = " ".join(f"{runs[name, seed]['accuracy']:.1%}" for seed in options.seeds)
        shares = [f"{mean[key] / means[FULL][key]:.1%}" if FULL in means else "" for key in ("accuracy", "seconds")]
        print(
            f"{name:<24}{mean['accuracy']:>9.1%}{shares[0]:>9} {each:<20}{mean['loss']:>9.4f}{mean['trained']:>11,.0f}"
            f"{mean['bytes'] / 1e6:>7.1f}{mean['seconds']:>6.0f}{shares[1]:>9}",
            flush=True,
        )


if __name__ == "__main__":
    main()
