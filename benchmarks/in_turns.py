"""Runs a training program whose optimizer steps alternate with another's: ``python -m benchmarks.in_turns``.

Only one of the two programs computes at any time, so that changes of the machine's speed affect both alike. It is started by
:mod:`benchmarks.script_pairs`.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class Turns:
    """Measures each optimizer step of this process and gives the turn to the other process after it.

    A step begins where the one before has ended, so that it includes reading data and all else that the program does. The first
    ``warm_up`` steps, the first of which includes the program's start, are not kept.

    Args:
        own: File descriptor from which this process reads a byte before its turn.
        other: File descriptor to which it writes a byte after its turn.
        steps: Measured steps.
        warm_up: Steps before them.
        result: File for the result.
    """

    def __init__(self, own: int, other: int, steps: int, warm_up: int, result: Path) -> None:
        self.own, self.other, self.steps, self.warm_up, self.result = own, other, steps, warm_up, result
        self.seconds: list[float] = []
        self.cuda = torch.cuda.is_available()
        os.read(own, 1)
        self.started = time.perf_counter()

    def step_ended(self, *_: Any) -> None:
        """Note the time, and wait for the next turn; the process ends after the last step."""
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)
        if len(self.seconds) == self.warm_up + self.steps:
            self._write()
            os.write(self.other, b"x")
            os._exit(0)  # what a program does at its end is not measured
        os.write(self.other, b"x")
        os.read(self.own, 1)
        self.started = time.perf_counter()

    def _write(self) -> None:
        memory = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if self.cuda else (0, 0)
        kept = {"seconds": self.seconds[self.warm_up :], "allocated": memory[0], "reserved": memory[1]}
        self.result.write_text(json.dumps(kept))


def main() -> None:
    own, other, steps, warm_up, result, program, *arguments = sys.argv[1:]
    turns = Turns(int(own), int(other), int(steps), int(warm_up), Path(result))
    register_optimizer_step_post_hook(turns.step_ended)
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__")


if __name__ == "__main__":
    main()
