"""Minutes that a person's hands need from images to the start of training: ``python benchmarks/keystrokes.py``.

Computed, not timed, by the Keystroke-Level Model (Card, Moran and Newell 1980, "The keystroke-level model for user
performance time with interactive systems"): times of an average typist (40 words a minute) for a key or a click, for
pointing, for the hand's way between keyboard and mouse, and for thinking of what to do next. Each tool has the shortest way
that its instructions show; what they show is pasted, and only what differs is typed. Reading, downloads and waiting are not
counted, nor are mistakes.
"""

from __future__ import annotations

from dataclasses import dataclass

KEY, POINT, HAND, THINK = 0.28, 1.10, 0.40, 1.35
"""Seconds of the model's operators K (an average typist who is no secretary, 40 words a minute), P, H and M."""

FOLDER, TRIGGER, BASE = "my_images", "sks dog", "stabilityai/stable-diffusion-xl-base-1.0"
NAME, PROMPT = "my_lora", "a photo of sks dog"


@dataclass(frozen=True)
class Effort:
    """What a person does."""

    keys: int = 0
    """Keys that are pressed."""
    points: int = 0
    """Ways of the mouse to a target."""
    thoughts: int = 0
    """Decisions about the next step."""

    def __add__(self, other: Effort) -> Effort:
        return Effort(self.keys + other.keys, self.points + other.points, self.thoughts + other.thoughts)

    @property
    def seconds(self) -> float:
        """The model's time: for each target the hand goes to the mouse, points, clicks and goes back."""
        return self.keys * KEY + self.points * (POINT + KEY + 2 * HAND) + self.thoughts * THINK


def typed(text: str, values: int = 1) -> Effort:
    """Text that is typed and ended with Enter; each of its values is a thought."""
    return Effort(len(text) + 1, 0, values)


def pasted() -> Effort:
    """An example that is marked from its beginning to its end, copied and pasted."""
    return Effort(4, 3, 1)


def changed(*values: str) -> Effort:
    """Values that are looked for in a file or a window and typed over."""
    return sum((Effort(len(value), 1, 1) for value in values), Effort())


def chosen(count: int) -> Effort:
    """Choices in lists of a window: one way to the list and one to the entry."""
    return Effort(0, 2 * count, count)


def edited(file: str) -> Effort:
    """An editor that is opened with a file, saved and left."""
    return typed(f"nano {file}") + Effort(4, 0, 1)


WAYS = {
    "lit_lora": typed(f'lit-lora train {FOLDER} --base sdxl --trigger "{TRIGGER}"', values=3),
    # docs/config_README-en.md and docs/train_network.md: both examples are pasted; a file of prompts for samples.
    "sd-scripts": edited("data.toml")
    + pasted()
    + changed("1024", FOLDER, TRIGGER)
    + edited("prompts.txt")
    + typed(PROMPT)
    + pasted()
    + changed("sdxl_", BASE, "data.toml", "out", NAME)
    + typed(" --sample_prompts=prompts.txt --sample_every_n_epochs=1", values=2),
    # documentation/quickstart/SDXL.md: both examples are pasted.
    "SimpleTuner": edited("config/config.json")
    + pasted()
    + changed("out")
    + edited("out/multidatabackend.json")
    + pasted()
    + changed(NAME, "cache/vae", FOLDER, "instanceprompt", f'"instance_prompt": "{TRIGGER}",', "cache/text")
    + typed("bash train.sh"),
    # docs/QuickStartGuide.md: two lists, four fields, a file with the prompt, the button.
    "OneTrainer": chosen(2)
    + changed("out", f"{NAME}.safetensors", FOLDER, "prompt.txt")
    + edited("prompt.txt")
    + typed(TRIGGER)
    + changed(PROMPT)
    + Effort(0, 1, 1),
    # config/examples and README.md: an example of another base is copied and eight values are changed.
    "ai-toolkit": typed(f"cp config/examples/train_lora_flux_24gb.yaml config/{NAME}.yaml")
    + edited(f"config/{NAME}.yaml")
    + changed(NAME, TRIGGER, FOLDER, BASE, "sdxl", "ddpm", "ddpm", PROMPT)
    + typed(f"python run.py config/{NAME}.yaml"),
}
"""What is done for twenty images of one subject without captions, a trigger word, SDXL, and images by the adapter."""


def minutes(way: Effort) -> str:
    """Minutes as the documentation shows them."""
    return f"{way.seconds / 60:.1f}"


def main() -> None:
    print("Computed by the Keystroke-Level Model, not timed; without reading, downloads and waiting.")
    print(f"{'':<14} {'keys':>6} {'mouse':>6} {'thoughts':>9} {'minutes':>8}")
    for name, way in WAYS.items():
        print(f"{name:<14} {way.keys:>6} {way.points:>6} {way.thoughts:>9} {minutes(way):>8}")


if __name__ == "__main__":
    main()
