from __future__ import annotations

import operator
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_lora.distributed.jobs import check_workers, run_jobs
from lit_lora.errors import UserError
from lit_lora.files import atomic_file


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_come_in_order_and_arguments_only_when_needed(jobs):
    taken = []

    def arguments():
        for number in range(50):
            taken.append(number)
            yield number, 1

    results = run_jobs(operator.add, arguments(), jobs)
    assert next(results) == 1
    assert len(taken) <= 4 * jobs
    assert list(results) == list(range(2, 51))


@pytest.mark.parametrize("jobs", [1, 2])
def test_exceptions_reach_the_caller(jobs):
    with pytest.raises(ZeroDivisionError):
        list(run_jobs(operator.truediv, [(1, 0)], jobs))


def test_processes_end_when_their_parent_is_killed():
    code = (
        "import os, time; from lit_lora.distributed.jobs import run_jobs\n"
        "if __name__ == '__main__':\n"
        "    results = run_jobs(os.getppid, [()] * 3, 2)\n"
        "    print(next(results), flush=True)\n"
        "    time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as parent:
        assert int(parent.stdout.readline()) == parent.pid
        children = [int(child) for child in _children(parent.pid)]
        assert len(children) >= 2
        parent.kill()
    deadline = time.monotonic() + 120
    while any(_is_running(child) for child in children):
        assert time.monotonic() < deadline, "processes are left over"
        time.sleep(0.05)


def test_processes_that_work_on_shards_do_not_load_lightning():
    code = (
        "import sys, lit_lora.datamodules.packing.pack; heavy = {'lightning', 'peft', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", f"{code}; assert not heavy, heavy"], check=True, cwd=Path(__file__).parents[2]
    )


def _children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_dead_process():
    with pytest.raises(UserError, match="one of 2 processes died"):
        list(run_jobs(os._exit, [(1,), (1,)], 2))


def _write(path):
    with atomic_file(path) as part:
        part.write_text("")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)


def test_sigterm_leaves_no_unfinished_file(tmp_path):
    with pytest.raises(UserError, match="one of 2 processes died"):
        list(run_jobs(_write, [(tmp_path / "file",)], 2))
    assert not list(tmp_path.iterdir())


def test_more_processes_than_the_machine_can_use():
    with pytest.raises(UserError, match=r"jobs=5000 is too large; it must be at most \d+; this machine has"):
        list(run_jobs(int, [], jobs=5000))
    check_workers(jobs=64)
