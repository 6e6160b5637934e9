"""Images of typed digits and shapes with their captions: the training data of the embedded base model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from lit_lora.embedded import DIGITS

SIZE = 32
"""Width and height of an image in pixels."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
THINGS = DIGITS + SHAPES
COLOURS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 220),
    "yellow": (245, 215, 40),
    "purple": (140, 50, 170),
}

_CANVAS = 128  # drawn at four times SIZE and then reduced, for smooth edges


@dataclass(frozen=True)
class Drawing:
    """One image with its caption and labels."""

    image: Image.Image
    """RGB image of ``SIZE`` x ``SIZE`` pixels."""
    caption: str
    thing: int
    """Index of the thing in :data:`THINGS`."""
    colour: int
    """Index of the thing's colour in :data:`COLOURS`."""
    background: int
    """Index of the background's colour in :data:`COLOURS`."""


def draw(rng: np.random.Generator) -> Drawing:
    """Draw one thing with random kind, colours, position, size and rotation."""
    thing = int(rng.integers(len(THINGS)))
    colour, background = (int(i) for i in rng.choice(len(COLOURS), size=2, replace=False))
    names = list(COLOURS)
    palette = list(COLOURS.values())

    mask = Image.new("L", (_CANVAS, _CANVAS), 0)
    pen = ImageDraw.Draw(mask)
    centre = tuple(_CANVAS / 2 + rng.uniform(-8, 8, size=2))
    extent = float(rng.uniform(80, 112))
    if thing < len(DIGITS):
        _draw_digit(pen, str(thing), centre, extent, stroke=int(rng.integers(0, 5)))
    else:
        _draw_shape(pen, THINGS[thing], centre, extent / 2)
    mask = mask.rotate(float(rng.uniform(-14, 14)), Image.Resampling.BICUBIC, center=centre)
    mask = mask.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 5))))
    image = Image.composite(
        Image.new("RGB", mask.size, _shade(palette[colour], rng)),
        Image.new("RGB", mask.size, _shade(palette[background], rng)),
        mask,
    ).resize((SIZE, SIZE), Image.Resampling.BOX)
    caption = _caption(rng, THINGS[thing], names[colour], names[background])
    return Drawing(image, caption, thing, colour, background)


def prompt(thing: str, colour: str, background: str) -> str:
    """The full caption of an image: thing, colour and background."""
    return f"a {colour} {thing} on {background}"


def _caption(rng: np.random.Generator, thing: str, colour: str, background: str) -> str:
    forms = (
        prompt(thing, colour, background),
        f"a {colour} {thing} on a {background} background",
        f"a {colour} {thing}",
        f"a typed {thing} on {background}" if thing in DIGITS else f"a {thing} on {background}",
        f"a {thing}",
    )
    return forms[rng.choice(len(forms), p=(0.4, 0.2, 0.15, 0.1, 0.15))]


def _shade(rgb: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    r, g, b = np.clip(np.asarray(rgb) + rng.integers(-12, 13, size=3), 0, 255)
    return int(r), int(g), int(b)


def _draw_digit(pen: ImageDraw.ImageDraw, text: str, centre: tuple[float, ...], extent: float, stroke: int) -> None:
    font = ImageFont.load_default(size=extent * 1.15)
    pen.text((centre[0], centre[1]), text, fill=255, font=font, anchor="mm", stroke_width=stroke, stroke_fill=255)


def _draw_shape(pen: ImageDraw.ImageDraw, name: str, centre: tuple[float, ...], radius: float) -> None:
    x, y = centre
    if name == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    elif name == "square":
        half = radius * 0.8
        pen.rectangle((x - half, y - half, x + half, y + half), fill=255)
    elif name == "triangle":
        pen.polygon(_polygon(x, y, [radius] * 3), fill=255)
    elif name == "star":
        pen.polygon(_polygon(x, y, [radius * 1.1, radius * 0.45] * 5), fill=255)
    elif name == "cross":
        arm = radius * 0.32
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=255)
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=255)
    elif name == "heart":
        angles = np.linspace(0, 2 * math.pi, 60)
        across = 16 * np.sin(angles) ** 3
        down = -(13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles))
        points = zip(x + across * radius / 16, y + down * radius / 16, strict=True)
        pen.polygon([(float(u), float(v)) for u, v in points], fill=255)
    else:
        raise ValueError(f"unknown shape {name!r}; choose one of {', '.join(SHAPES)}")


def _polygon(x: float, y: float, radii: list[float]) -> list[tuple[float, float]]:
    """Corners of a polygon at the given distances from its centre; the first is straight above the centre."""
    turn = 2 * math.pi / len(radii)
    return [(x + r * math.sin(i * turn), y - r * math.cos(i * turn)) for i, r in enumerate(radii)]
