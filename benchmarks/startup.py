"""Time until a command answers, in multiples of the libraries' own import: ``python benchmarks/startup.py``.

Each command runs in fresh processes and is measured in CPU seconds (user and system, of its children too), so that other load on
the machine matters less. The baseline is ``python -c "import torch, lightning, diffusers"``. The rounds take turns: in each, the
baseline and then every command runs once; the table has the medians, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from environment import cpu_cores, versions

BASELINE = "import torch, lightning, diffusers"
_SDXL = "model.family.init_args.pretrained_model_name_or_path"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each command")
    parser.add_argument("--only", nargs="*", help="parts of the names of the commands to measure")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands = _commands(Path(folder))
        if options.only:
            commands = {name: one for name, one in commands.items() if any(part in name for part in options.only)}
        seconds = _measured(BASELINE, commands, options.rounds, Path(folder))
    print(f"{cpu_cores()}, {versions('torch', 'lightning', 'diffusers', 'peft', 'jsonargparse')}")
    print(f"medians of {options.rounds} rounds\n")
    base = statistics.median(seconds[""])
    print(f"{'':<52} {'CPU s':>7} {'ratio':>6}")
    print(f"{BASELINE:<52} {base:>7.2f} {1:>6.2f}")
    for name in commands:
        median = statistics.median(seconds[name])
        print(f"{name:<52} {median:>7.2f} {median / base:>6.2f}")


def _commands(folder: Path) -> dict[str, list[str]]:
    """Commands by the name that the table shows; all that they need is in the folder."""
    from real_models import write_pipeline

    sdxl = write_pipeline("sdxl", folder / "sdxl", weights=False)
    (folder / "key.yaml").write_text("trainer: {max_stepz: 3}\n")
    plan = ["plan", "--config", "configs/sdxl.yaml", f"--{_SDXL}", str(sdxl)]
    shards = _shards(folder)
    demo = [
        "fit",
        "--config",
        "configs/demo.yaml",
        "--data.init_args.train_shards",
        shards,
        "--data.init_args.val_samples=0",
    ]
    demo += ["--trainer.default_root_dir", str(folder / "run"), "--trainer.callbacks=null"]
    return {
        "fit --help": ["fit", "--help"],
        "plan --help": ["plan", "--help"],
        "fit with a file that does not exist": ["fit", "--config", "missing.yaml"],
        "fit with an overlay that does not exist": ["fit", "--config", "configs/overlays/13gb.yaml"],
        "fit with an unknown key": ["fit", "--config", str(folder / "key.yaml")],
        "fit with a value that is not possible": [
            "fit",
            "--config",
            "configs/demo.yaml",
            "--trainer.precision",
            "fp17",
        ],
        "fit, one step of the demo's model": [*demo, "--trainer.max_steps=1", "--data.init_args.batch_size=4"],
        "plan of sdxl on a GPU": [*plan, "--device", "RTX 3060"],
        "plan of sdxl on a GPU with 12 GB": [*plan, "--device", "RTX 3060", "--device_memory", "12"],
        "plan of sdxl on the CPU with 12 GB": [*plan, "--device", "cpu", "--device_memory", "12"],
        "plan of sdxl on the CPU with 24 GB, --search": [
            *plan,
            "--device",
            "cpu",
            "--device_memory",
            "24",
            "--search",
            "true",
        ],
        "plan of sdxl on a GPU with 12 GB, --search": [
            *plan,
            "--device",
            "RTX 3060",
            "--device_memory",
            "12",
            "--search",
            "true",
        ],
    }


def _shards(folder: Path) -> str:
    """Shards of a few blank images."""
    import numpy as np
    from PIL import Image

    (folder / "images").mkdir()
    for number in range(8):
        Image.fromarray(np.full((32, 32, 3), 8 * number, np.uint8)).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text("a square")
    shards = str(folder / "shards")
    packed = ["shards", "pack", str(folder / "images"), shards]
    subprocess.run([sys.executable, "-m", "lit_lora.cli", *packed], check=True, capture_output=True)
    return shards


def _measured(
    baseline: str, commands: Mapping[str, Sequence[str]], rounds: int, folder: Path
) -> dict[str, list[float]]:
    """CPU seconds of each command's runs, and of the baseline's under an empty name; one round before them is not counted."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    seconds: dict[str, list[float]] = {"": [], **{name: [] for name in commands}}
    for name, arguments in commands.items():
        if "--help" in arguments:  # the first call after an installation makes the text
            print(f"{name} for the first time: {_cpu_seconds(_cli(arguments), environment):.2f} CPU s", flush=True)
    _cpu_seconds([sys.executable, "-c", baseline], environment)  # reads the files into memory
    for _ in range(rounds):
        seconds[""].append(_cpu_seconds([sys.executable, "-c", baseline], environment))
        for name, arguments in commands.items():
            seconds[name].append(_cpu_seconds(_cli(arguments), environment))
            print(f"  {name}: {seconds[name][-1]:.2f} CPU s", file=sys.stderr, flush=True)
    return seconds


def _cli(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "lit_lora.cli", *arguments]


def _cpu_seconds(command: Sequence[str], environment: Mapping[str, str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 1, 2):  # a plan that does not fit ends with 1, a refused config with 2
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}; its errors:\n{done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
