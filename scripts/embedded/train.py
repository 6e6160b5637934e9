"""Train the embedded base model on drawn images: ``python scripts/embedded/train.py --out FOLDER``.

Writes a complete Stable Diffusion pipeline folder (VAE, text encoder, tokenizer, UNet, scheduler) and measures with an
independent classifier whether the generated images show what their captions ask for. The figures are written into the
folder's model card. All random numbers are seeded. Training takes 30 to 60 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import itertools
import math
import string
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from drawing import COLOURS, DIGITS, SIZE, THINGS, draw, prompt
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MAX_TOKENS = 32
GUIDANCE_SCALE = 3.0
INFERENCE_STEPS = 25


@dataclass(frozen=True)
class DrawnImages:
    """``N`` drawn images as tensors."""

    images: Tensor
    """uint8 pixels, ``(N, 3, SIZE, SIZE)``."""
    captions: list[str]
    labels: Tensor
    """int64, ``(N, 3)``: thing, colour and background."""

    @classmethod
    def from_seed(cls, count: int, seed: int) -> DrawnImages:
        """Draw ``count`` images."""
        rng = np.random.default_rng(seed)
        drawings = [draw(rng) for _ in range(count)]
        images = torch.from_numpy(np.stack([np.asarray(d.image) for d in drawings])).permute(0, 3, 1, 2)
        labels = torch.tensor([(d.thing, d.colour, d.background) for d in drawings])
        return cls(images.contiguous(), [d.caption for d in drawings], labels)


def pixels(images: Tensor) -> Tensor:
    """Convert uint8 images to floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def train_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Train a byte-level BPE tokenizer like CLIP's, with tokens for the captions' words; other words are spelled in bytes."""
    characters = list(string.ascii_lowercase + string.digits + string.punctuation)
    # Common words of users' captions get tokens of their own too.
    words = ["handwritten", "digit", "photo", "picture", "drawing", "of", "the", "and", "with", "in", "style"]
    corpus = itertools.chain(captions, characters, words * 3)
    tokenizer = CLIPTokenizer().train_new_from_iterator(corpus, vocab_size=1024, show_progress=False)
    tokenizer.model_max_length = MAX_TOKENS
    return tokenizer


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=SIZE,
    )


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(64, 112),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=64,
        attention_head_dim=2,  # the number of heads, by diffusers' historical naming
        norm_num_groups=16,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of indices, in a new random order on each pass."""
    while True:
        for batch in torch.randperm(count, generator=generator).split(batch_size):
            if len(batch) == batch_size:
                yield batch


def fit(
    name: str,
    parameters: list[nn.Parameter],
    loss: Callable[[], Tensor],
    *,
    steps: int,
    lr: float,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Minimise ``loss`` with AdamW; the learning rate warms up briefly and then follows a cosine to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-2)
    warm_up = max(1, steps // 20)
    schedule = LambdaLR(
        optimizer, lambda i: min((i + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * min(1.0, i / steps))))
    )
    started, running = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        after_step()
        running += (value.item() - running) / min(step, 100)
        if step % 100 == 0 or step == steps:
            print(f"{name}: step {step}/{steps}, loss {running:.4f}, {time.monotonic() - started:.0f} s", flush=True)


def train_vae(train: DrawnImages, held_out: DrawnImages, steps: int) -> tuple[AutoencoderKL, float]:
    """Train the VAE and set its ``scaling_factor``.

    Returns:
        The VAE and its reconstruction error on the held-out images (MSE on [-1, 1]).
    """
    vae = new_vae()
    generator = torch.Generator().manual_seed(1)
    source = batches(len(train.images), 48, generator)

    def loss() -> Tensor:
        x = pixels(train.images[next(source)])
        posterior = vae.encode(x).latent_dist
        reconstruction = vae.decode(posterior.sample(generator=generator)).sample
        return F.mse_loss(reconstruction, x) + 0.1 * F.l1_loss(reconstruction, x) + 1e-5 * posterior.kl().mean()

    fit("vae", list(vae.parameters()), loss, steps=steps, lr=1.5e-3)
    vae.eval().requires_grad_(False)
    x = pixels(held_out.images)
    means = torch.cat([vae.encode(part).latent_dist.mode() for part in x.split(256)])
    error = F.mse_loss(torch.cat([vae.decode(part).sample for part in means.split(256)]), x).item()
    vae.register_to_config(scaling_factor=round(1 / means.std().item(), 4))
    return vae, error


def train_denoiser(
    train: DrawnImages, vae: AutoencoderKL, tokenizer: CLIPTokenizer, scheduler: DDIMScheduler, steps: int
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train UNet and text encoder together to predict noise (Ho et al. 2020, arXiv:2006.11239).

    Returns:
        Both models with the exponential moving average of their weights.
    """
    unet, text_encoder = new_unet(), new_text_encoder(tokenizer)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        posteriors = [vae.encode(pixels(part)).latent_dist for part in train.images.split(256)]
    mean = torch.cat([p.mean for p in posteriors]) * vae.config.scaling_factor
    std = torch.cat([p.std for p in posteriors]) * vae.config.scaling_factor
    ids = tokenize(tokenizer, train.captions)
    empty = tokenize(tokenizer, [""])[0]
    source = batches(len(mean), 64, generator)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    average = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75)

    def loss() -> Tensor:
        chosen = next(source)
        tokens = ids[chosen].clone()
        tokens[torch.rand(len(chosen), generator=generator) < 0.1] = empty
        x = mean[chosen] + std[chosen] * torch.randn(mean[chosen].shape, generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        t = torch.randint(scheduler.config.num_train_timesteps, (len(x),), generator=generator)
        prediction = unet(scheduler.add_noise(x, noise, t), t, text_encoder(tokens)[0]).sample
        return F.mse_loss(prediction.float(), noise)

    fit("unet", parameters, loss, steps=steps, lr=1e-3, after_step=lambda: average.step(parameters))
    average.copy_to(parameters)
    return unet.eval(), text_encoder.eval()


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids of the captions, int64, ``(len(captions), MAX_TOKENS)``."""
    tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return tokens.input_ids


def train_pipeline(
    train: DrawnImages, held_out: DrawnImages, vae_steps: int, unet_steps: int
) -> tuple[StableDiffusionPipeline, float]:
    """Train all models of the pipeline.

    Returns:
        The pipeline, and the VAE's reconstruction error on the held-out images.
    """
    tokenizer = train_tokenizer(train.captions)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    vae, error = train_vae(train, held_out, vae_steps)
    print(f"vae: reconstruction error {error:.4f}, scaling factor {vae.config.scaling_factor}", flush=True)
    unet, text_encoder = train_denoiser(train, vae, tokenizer, scheduler, unet_steps)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return pipeline, error


class Classifier(nn.Module):
    """Convolutional classifier of thing, colour and background, independent of the diffusion model."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * (SIZE // 8) ** 2, 128), nn.ReLU(),
        )  # fmt: skip
        self.heads = nn.ModuleList(nn.Linear(128, n) for n in (len(THINGS), len(COLOURS), len(COLOURS)))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.features(x)
        return [head(features) for head in self.heads]

    @torch.no_grad()
    def right(self, images: Tensor, labels: Tensor) -> Tensor:
        """Whether thing, colour and background of each image are classified as labelled, bool, ``(N, 3)``."""
        return torch.stack([logits.argmax(1) for logits in self(pixels(images))], 1) == labels


def train_classifier(train: DrawnImages, steps: int) -> Classifier:
    """Train the classifier on drawn images."""
    classifier = Classifier()
    generator = torch.Generator().manual_seed(3)
    source = batches(len(train.images), 128, generator)

    def loss() -> Tensor:
        chosen = next(source)
        logits = classifier(pixels(train.images[chosen]))
        labels = train.labels[chosen]
        return torch.stack([F.cross_entropy(out, labels[:, i]) for i, out in enumerate(logits)]).sum()

    fit("classifier", list(classifier.parameters()), loss, steps=steps, lr=2e-3)
    return classifier.eval()


def measure(
    pipeline: StableDiffusionPipeline, classifier: Classifier, per_thing: int
) -> tuple[dict[str, float], list[Image.Image]]:
    """Generate ``per_thing`` images of each thing and classify them.

    Returns:
        The shares of images that show what their captions ask for, and the images.
    """
    rng = np.random.default_rng(7)
    labels = [
        (thing, *(int(i) for i in rng.choice(len(COLOURS), size=2, replace=False)))
        for thing in range(len(THINGS))
        for _ in range(per_thing)
    ]
    colours = list(COLOURS)
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(labels), 64):
        prompts = [prompt(THINGS[t], colours[c], colours[b]) for t, c, b in labels[start : start + 64]]
        images += pipeline(
            prompts,
            num_inference_steps=INFERENCE_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(prompts))],
        ).images
    arrays = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    right = classifier.right(arrays, torch.tensor(labels)).float()
    is_digit = torch.tensor([thing < len(DIGITS) for thing, _, _ in labels])
    shares = {
        "digits recognised": right[is_digit, 0].mean().item(),
        "shapes recognised": right[~is_digit, 0].mean().item(),
        "colours right": right[:, 1].mean().item(),
        "backgrounds right": right[:, 2].mean().item(),
        "everything right": right.all(1).float().mean().item(),
    }
    return shares, images


CARD = """---
license: apache-2.0
tags: [stable-diffusion, text-to-image]
---
# The embedded base model of lit_lora

A complete Stable Diffusion pipeline that generates {size} x {size} images of coloured typed digits and shapes
("{example}"). It is small enough to train on a CPU and serves for first steps, examples and tests.
`python scripts/embedded/train.py` made it, from images that the script draws.

| figure | value |
|---|---|
{figures}

The first five figures are shares of {judged} generated images ({steps} DDIM steps, guidance scale {guidance}), according to
a classifier that was trained on drawn images only.
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python scripts/embedded/train.py", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist yet")
    parser.add_argument("--images", type=int, default=40_000, help="number of drawn images to train on")
    parser.add_argument("--vae-steps", type=int, default=1_500)
    parser.add_argument("--unet-steps", type=int, default=4_500)
    parser.add_argument("--classifier-steps", type=int, default=1_500)
    parser.add_argument("--per-thing", type=int, default=20, help="images to generate and classify for each thing")
    options = parser.parse_args(arguments)
    if options.out.exists():
        parser.error(f"{options.out} exists; name a new folder")
    if options.per_thing < 2:
        parser.error(
            f"--per-thing must be at least 2, not {options.per_thing}: samples.png shows two images of each thing"
        )

    torch.manual_seed(0)
    train, held_out = DrawnImages.from_seed(options.images, seed=0), DrawnImages.from_seed(2_000, seed=1)
    classifier = train_classifier(train, options.classifier_steps)
    drawn_right = classifier.right(held_out.images, held_out.labels).float().mean(0).tolist()
    print("classifier on drawn images (thing, colour, background):", [round(x, 4) for x in drawn_right], flush=True)

    pipeline, vae_error = train_pipeline(train, held_out, options.vae_steps, options.unet_steps)
    staging = options.out.with_name(options.out.name + ".part")
    # Half precision halves the size of the folder; the figures below are measured on the models as read back from it. The
    # text encoder stays in float32: transformers loads a file in the precision that it is stored in, diffusers in float32.
    pipeline.vae.to(torch.float16)
    pipeline.unet.to(torch.float16)
    pipeline.save_pretrained(staging)
    pipeline = StableDiffusionPipeline.from_pretrained(staging)
    shares, images = measure(pipeline, classifier, options.per_thing)
    figures = {
        **shares,
        "classifier right on drawn things": drawn_right[0],
        "VAE reconstruction error (MSE on [-1, 1])": vae_error,
        "parameters (UNet)": sum(p.numel() for p in pipeline.unet.parameters()),
    }
    for name, value in figures.items():
        print(f"{name}: {value:.4g}")
    make_image_grid(images[:: max(1, options.per_thing // 2)][:32], rows=4, cols=8).save(staging / "samples.png")
    card = CARD.format(
        size=SIZE,
        example=prompt("seven", "red", "white"),
        figures="\n".join(f"| {name} | {value:.4g} |" for name, value in figures.items()),
        judged=len(images),
        steps=INFERENCE_STEPS,
        guidance=GUIDANCE_SCALE,
    )
    (staging / "README.md").write_text(card, encoding="utf-8")
    staging.rename(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
