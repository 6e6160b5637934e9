"""What tests learn about the processes that they start."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fresh_processes import ProcessError, run_processes
from tests.helpers import made_once


@pytest.mark.parametrize(
    ("end", "crashed", "told"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", True, r"failed in process 0 \(ended by SIGSEGV\).*the first words"),
        ("sys.exit(3)", False, r"failed in process 0 \(exit status 3\).*the first words"),
    ],
)
def test_it_is_told_how_a_process_ended(tmp_path: Path, end: str, crashed: bool, told: str) -> None:
    program = f"import os, signal, sys; print('the first words', file=sys.stderr, flush=True); {end}"
    with pytest.raises(ProcessError, match=f"(?s){told}") as caught:
        run_processes(["-c", program], 1, tmp_path, timeout=300)
    assert caught.value.crashed is crashed


def test_the_port_where_processes_meet_is_held_before_they_begin(tmp_path: Path) -> None:
    program = "import os, socket; socket.create_connection(('127.0.0.1', int(os.environ['MASTER_PORT'])), timeout=60)"
    run_processes(["-c", program], 2, tmp_path, timeout=300)


@pytest.mark.parametrize(("crashed", "trials"), [(True, 2), (False, 1)])
def test_a_folder_is_made_again_after_a_crash(
    crashed: bool, trials: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made: list[bool] = []

    def make(folder: Path) -> None:
        made.append((folder / "rest").exists())
        (folder / "rest").touch()
        if len(made) == 1:
            raise ProcessError("failed", crashed)

    name = f"made once {crashed}"
    if crashed:
        folder = made_once(tmp_path_factory, name, make)
        assert (folder / "done").exists()
    else:
        with pytest.raises(ProcessError):
            made_once(tmp_path_factory, name, make)
    assert made == [False] * trials
