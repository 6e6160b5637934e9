"""Share of the limit that loader threads reach on short passes: ``python benchmarks/short_passes.py [--tree FOLDER ...]``.

Each pass of WebDatasetDataModule is measured with two decoders:

- waiting: sleeps 4 to 12 ms for each sample, so that other programs on the machine hardly matter. The limit is the sleep of all
  samples, shared by as many threads one by one; what is missing is time in which a thread has nothing to do.
- decoding: reads JPEGs as in ``data_throughput.py``. The limit is decoding, resizing and cropping alone in as many processes.
- whole work: the same passes. The limit also reads the bytes from the shards and copies the images into batches, which no loader
  can leave out: what is missing is checks, order, Python's lock and waiting.

Several trees, for example checkouts of two commits, are compared in one run: each has a process of its own, which waits while
another makes a pass. Ratios are medians over the rounds, each to the limit of its round.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from data_throughput import Cost, Pass, cpu_seconds, limit, ours, passes_with, processor, whole_limit, write_data
from environment import versions

from lit_lora.datamodules import SampleDecoder
from lit_lora.draws import seed_of


class WaitingDecoder(SampleDecoder):
    """Takes 4 to 12 ms for each sample without computing."""

    @property
    def required(self) -> dict[str, tuple[str, ...]]:
        return {"caption": ("txt",)}

    def __call__(
        self, members: Mapping[str, bytes], slot: int, size: tuple[int, int], image_size: tuple[int, int]
    ) -> dict[str, Any]:
        time.sleep(seconds(int(members["txt"].split()[1])))
        return {"number": torch.tensor(0)}

    def blank(self, size: tuple[int, int]) -> dict[str, Any]:
        return {"number": torch.tensor(0)}


def seconds(number: int) -> float:
    """The wait for a sample."""
    return 0.004 + 0.008 * (seed_of(number) % 1000) / 1000


def serve(folder: Path, batch_size: int, workers: int) -> None:
    """Make a pass for each line on standard input and answer with its wall and CPU seconds."""
    torch.set_num_threads(1)
    read = (folder, batch_size, workers)
    passes = {"waiting": passes_with(WaitingDecoder(), *read), "decoding": ours(*read)}
    print("ready", flush=True)
    for line in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        passes[line.strip()]()
        print(time.perf_counter() - wall, time.process_time() - cpu, flush=True)


class Tree:
    """A process that makes passes with the code of one checkout."""

    def __init__(self, tree: str, folder: Path, batch_size: int, workers: int) -> None:
        command = [sys.executable, __file__, "--serve", str(folder), "--batch-size", str(batch_size)]
        environment = os.environ | {"PYTHONPATH": tree}
        self._process = subprocess.Popen(
            [*command, "--workers", str(workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._read() == "ready"

    def go(self, kind: str) -> Cost:
        """Make one pass."""
        assert self._process.stdin is not None
        print(kind, file=self._process.stdin, flush=True)
        wall, cpu = self._read().split()
        return Cost(float(wall), float(cpu))

    def close(self) -> None:
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def of_decoding(
    images: list[bytes], folder: Path, batch_size: int, workers: int, rounds: int, trees: dict[str, Tree]
) -> list[str]:
    """Lines of the table for decoding, one for each limit."""
    # The processes of the limits end with this function; until then they hold the trees' standard input.
    limits = {"decoding": limit(images, workers), "whole work": whole_limit(folder, batch_size, workers)}
    shares: dict[tuple[str, str], list[Cost]] = {(kind, name): [] for kind in limits for name in trees}
    for number in range(rounds + 1):  # the first warms up
        bounds = {kind: cost_of(at_most) for kind, at_most in limits.items()}
        for name, tree in trees.items():
            cost = tree.go("decoding")
            for kind, bound in bounds.items():
                if number:
                    shares[kind, name].append(Cost(bound.wall / cost.wall, bound.cpu / cost.cpu))
    return [
        f"{kind:<12}{name:<20}{middle(costs, 0):>14}{middle(costs, 1):>14}" for (kind, name), costs in shares.items()
    ]


def cost_of(at_most: Pass) -> Cost:
    """Wall and CPU seconds of one pass of a limit."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    at_most()
    return Cost(time.perf_counter() - wall, cpu_seconds() - cpu)


def of_waiting(count: int, workers: int, rounds: int, trees: dict[str, Tree]) -> list[str]:
    """Lines of the table for waiting."""
    shares: dict[str, list[Cost]] = {name: [] for name in trees}
    with ThreadPoolExecutor(workers) as pool:
        for number in range(rounds + 1):
            wall = time.perf_counter()
            list(pool.map(time.sleep, map(seconds, range(count))))
            wall = time.perf_counter() - wall
            for name, tree in trees.items():
                cost = tree.go("waiting")
                if number:
                    shares[name].append(Cost(wall / cost.wall, 0))
    return [f"{'waiting':<12}{name:<20}{middle(costs, 0):>14}{'':>14}" for name, costs in shares.items()]


def middle(shares: list[Cost], place: int) -> str:
    return f"{statistics.median(one[place] for one in shares):.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", nargs="+", default=[str(Path(__file__).parent.parent)], help="checkouts to measure")
    parser.add_argument("--images", type=int, nargs="+", default=[48, 80, 176, 640], help="images in a pass")
    parser.add_argument("--rounds", type=int, default=7, help="measured passes")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.batch_size, options.workers)
        return
    torch.set_num_threads(1)
    print(
        f"{os.cpu_count()} cores of {processor()}, Python {platform.python_version()}, {versions('torch', 'torchvision')}"
    )
    print(f"{options.workers} threads, batches of {options.batch_size}, {options.rounds} rounds; share of the limit")
    for count in options.images:
        with tempfile.TemporaryDirectory() as folder:
            images = write_data(Path(folder), count)
            trees = {
                Path(tree).name: Tree(tree, Path(folder), options.batch_size, options.workers) for tree in options.tree
            }
            print(f"\n{count} images\n{'':<12}{'':<20}{'wall':>14}{'CPU':>14}")
            for line in of_waiting(count, options.workers, options.rounds, trees):
                print(line, flush=True)
            for line in of_decoding(images, Path(folder), options.batch_size, options.workers, options.rounds, trees):
                print(line, flush=True)
            for one in trees.values():
                one.close()


if __name__ == "__main__":
    main()
