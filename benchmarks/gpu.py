"""Everything that needs a GPU, in order of worth and in slices of at most nine minutes: ``python -m benchmarks.gpu``.

Each slice writes ``benchmarks/results/gpu/NAME.txt``: device, versions, commit, command, and what the command printed. A slice
that has such a file of the present code is not run again, so that the list can be worked off in several goes; ``--list`` shows
what is missing, failed, or older than the code that it measures. A slice that fails or takes too long keeps what it has printed,
and the next one begins.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.environment import versions
from lit_lora.files import atomic_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
LONGEST = 9 * 60
"""Seconds that a slice may take."""
_MEASURED = ("lit_lora",)


@dataclass(frozen=True)
class Slice:
    """A command and what it measures.

    Args:
        name: Name of the file with the result.
        command: Arguments of Python.
        code: Files and folders whose changes make the result old.
    """

    name: str
    command: tuple[str, ...]
    code: tuple[str, ...] = _MEASURED


def _tests(name: str, chosen: str, file: str = "tests/test_cuda.py") -> Slice:
    command = ("-m", "pytest", file, "-q", "-rfE", "-n", "0", "--tb=short", "-p", "no:cacheprovider")
    return Slice(name, (*command, "-k", chosen), (*_MEASURED, file))


def _memory(name: str, *rows: str) -> Slice:
    command = ("benchmarks/memory.py", "--model", "sdxl", "--resolution", "1024", "--device", "cuda", "--only", *rows)
    return Slice(name, command, (*_MEASURED, "benchmarks/memory.py"))


def _speed(name: str, model: str, resolution: int, *settings: str, options: Sequence[str] = ()) -> Slice:
    sizes = ("--model", model, "--resolution", str(resolution), "--device", "cuda", *options)
    command = ("-m", "benchmarks.speed", *sizes, "--only", *settings)
    return Slice(name, command, (*_MEASURED, "benchmarks/speed.py", "benchmarks/bare_step.py"))


def _planner(name: str, size: int, *settings: str) -> Slice:
    command = ("benchmarks/planner.py", "--device", "cuda", "--size", str(size), "--only", *settings)
    return Slice(name, command, (*_MEASURED, "benchmarks/planner.py"))


def _pairs(scripts: Path, name: str, script: str, model: str, resolution: int, *settings: str) -> Slice:
    sizes = ("--model", model, "--resolution", str(resolution), "--checkpointing", "--steps", "15")
    command = ("-m", "benchmarks.script_pairs", str(scripts / script), *sizes, "--only", *settings)
    return Slice(name, command, (*_MEASURED, "benchmarks/script_pairs.py", "benchmarks/in_turns.py"))


def pairs_of_scripts(scripts: Path) -> tuple[Slice, ...]:
    """Slices that compare with scripts of diffusers' ``examples``, all in one folder."""
    settings = ("images and captions", "cached, fused LoRA", "cached, compiled", "cached, int8", "cached, nf4")
    sd15, sdxl = "train_text_to_image_lora.py", "train_text_to_image_lora_sdxl.py"
    flux = "train_dreambooth_lora_flux.py"
    return (
        _pairs(scripts, "pairs_sdxl", sdxl, "sdxl", 1024, *settings[:2]),
        _pairs(scripts, "pairs_flux", flux, "flux_dev", 512, settings[0], settings[1]),
        _pairs(scripts, "pairs_sdxl_further", sdxl, "sdxl", 1024, *settings[2:]),
        _pairs(scripts, "pairs_flux_further", flux, "flux_dev", 512, settings[2], settings[4]),
        _pairs(scripts, "pairs_sd15", sd15, "sd15", 512, *settings),
    )


SLICES = (
    _tests("tests", "not strategies and not deepspeed and not compiled"),
    _tests("tests_strategies", "strategies or compiled"),
    _tests("tests_deepspeed", "deepspeed"),
    _tests("tests_steps", "", "tests/test_cuda_steps.py"),
    _memory("memory_sdxl_checkpointing", *(f"LoRA, {base} base, checkpointing" for base in ("bf16", "int8", "nf4"))),
    _speed("speed_sdxl", "sdxl", 1024, "cached", "cached, int8", "cached, nf4"),
    _speed("speed_flux", "flux_dev", 512, "nf4, checkpointing", "nf4, least", options=("--steps", "8")),
    _speed("speed_sdxl_w8a8", "sdxl", 1024, "w8a8"),
    _planner("planner_cached", 512, "from a cache", "base, checkpointing"),
    _speed(
        "speed_sdxl_options",
        "sdxl",
        1024,
        "channels last",
        "fused LoRA",
        "cached, compiled",
        "blocks on the host",
        "blocks on the disk",
    ),
    _speed("speed_sdxl_batch_4", "sdxl", 1024, "cached", options=("--batch-size", "4", "--steps", "10")),
    _memory(
        "memory_sdxl_storages", "full fine-tuning, bf16 autocast", "LoRA, bf16 base", "LoRA, nf4 base", "LoRA, fp8 base"
    ),
    _memory("memory_sdxl_further", "... "),
    _memory("memory_sdxl_encoders", "with encoders"),
    _planner("planner_images", 512, "batch 2", "8-bit AdamW", "r=128"),
    _speed("speed_sd15", "sd15", 512, "cached", "images and captions"),
    _speed(
        "speed_flux_storages", "flux_dev", 512, "cached, checkpointing", "int8, checkpointing", options=("--steps", "8")
    ),
    Slice(
        "quality_quantized",
        ("-m", "benchmarks.quality", "--steps", "200", "--seeds", "0", "--only", "LoRA+"),
        (*_MEASURED, "benchmarks/quality.py"),
    ),
)
"""All slices, the most useful first."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show the state of each slice and run nothing")
    parser.add_argument(
        "--minutes", type=float, default=LONGEST / 60, help="begin no slice after this time; defaults to 9"
    )
    parser.add_argument("--only", nargs="*", help="parts of the names of the slices")
    parser.add_argument("--again", action="store_true", help="also run slices whose result is up to date")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--scripts", type=Path, help="folder with diffusers' training scripts, to compare with them first"
    )
    options = parser.parse_args()
    slices = (pairs_of_scripts(options.scripts) if options.scripts else ()) + SLICES
    chosen = [one for one in slices if not options.only or any(part in one.name for part in options.only)]
    if options.list:
        for one in chosen:
            print(f"{one.name:<28} {state(one, options.out):<22} python {shlex.join(one.command)}")
        return
    if not torch.cuda.is_available():
        parser.exit(2, "torch finds no GPU: nothing to measure; --list shows what waits for one\n")
    end = time.monotonic() + 60 * options.minutes
    for one in chosen:
        left = end - time.monotonic()
        if state(one, options.out) == "up to date" and not options.again:
            continue
        if left < 60:
            print(f"{one.name}: not begun, less than a minute is left")
            continue
        print(f"{one.name}: {run(one, options.out, min(left, LONGEST))}", flush=True)


def state(one: Slice, out: Path) -> str:
    """What a slice's file says: missing, failed, older than the code, or up to date."""
    file = out / f"{one.name}.txt"
    if not file.exists():
        return "missing"
    facts = dict(_facts(file.read_text(encoding="utf-8")))
    if facts.get("exit status") != "0":
        return f"failed ({facts.get('exit status', 'no status')})"
    return "up to date" if facts.get("code") == _digest(one.code) else "older than the code"


def run(one: Slice, out: Path, seconds: float) -> str:
    """Run a slice and write its file.

    Args:
        one: The slice.
        out: Folder of the results.
        seconds: Seconds after which it is ended.

    Returns:
        How it ended.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace", newline="") as printed:
        process = subprocess.Popen(
            [sys.executable, *one.command],
            stdout=printed,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            status = str(process.wait(seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            status = f"ended after {seconds:.0f} s"
        printed.seek(0)
        lines = [
            line.rpartition("\r")[2] for line in printed.read().rstrip("\n").split("\n")
        ]  # progress bars write over lines
    head = {
        "command": f"python {shlex.join(one.command)}",
        "device": _device(),
        "versions": versions("torch", "lightning", "diffusers", "peft", "transformers", "bitsandbytes", "deepspeed"),
        "commit": _commit(),
        "code": _digest(one.code),
        "seconds": f"{time.monotonic() - started:.0f}",
        "exit status": status,
    }
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(out / f"{one.name}.txt") as part:
        facts = [f"{key}: {value}" for key, value in head.items()]
        part.write_text("\n".join([*facts, "", *lines, ""]), encoding="utf-8")
    return "done" if status == "0" else f"failed ({status})"


def _facts(text: str) -> Iterator[tuple[str, str]]:
    """The lines ``key: value`` at the beginning of a result."""
    for line in text.splitlines():
        if not line:
            return
        key, _, value = line.partition(": ")
        yield key, value


def _device() -> str:
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return "; ".join(found.splitlines())


def _commit() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # a copy of the files alone
        return "unknown"
    return done.stdout.strip()


def _digest(code: Sequence[str]) -> str:
    """Digest of all Python files in some files and folders, which is the same with and without a checkout."""
    digest = hashlib.sha256()
    for name in code:
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    main()
