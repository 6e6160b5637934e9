"""What a command needs of its process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = f"{sys.executable} -m lit_lora"


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_runs_with_closed_streams(closed: str, tmp_path: Path) -> None:
    assert run(f"{COMMAND} --help {closed}", tmp_path).returncode == 0
    assert run(f"{COMMAND} unknown {closed}", tmp_path).returncode == 2


def test_files_do_not_take_the_numbers_of_closed_streams(tmp_path: Path) -> None:
    code = (
        "import os; from lit_lora.own_process import open_standard_streams; open_standard_streams()\n"
        "file = open('data', 'w'); [os.write(number, b'printed') for number in (1, 2)]; print('more', flush=True)"
    )
    assert run(f'{sys.executable} -c "{code}" <&- >&- 2>&-', tmp_path).returncode == 0
    assert (tmp_path / "data").read_text() == ""


def test_processes_that_are_started_have_the_streams_too(tmp_path: Path) -> None:
    child = "import sys; sys.exit(sys.stdout is None or sys.stderr is None)"
    code = (
        "import subprocess, sys; from lit_lora.own_process import open_standard_streams; open_standard_streams()\n"
        f"sys.exit(subprocess.run([sys.executable, '-c', '{child}']).returncode)"
    )
    assert run(f'{sys.executable} -c "{code}" >&- 2>&-', tmp_path).returncode == 0


def test_python_without_docstrings_is_refused(tmp_path: Path) -> None:
    result = run(f"PYTHONOPTIMIZE=2 {COMMAND} shards info missing", tmp_path)
    assert result.returncode == 2
    assert "leave out -OO, and unset PYTHONOPTIMIZE or set it to 1" in result.stderr


def test_a_removed_working_folder_is_told(tmp_path: Path) -> None:
    result = run(f"mkdir gone; cd gone; rmdir ../gone; {COMMAND} shards info missing", tmp_path)
    assert result.returncode == 2
    assert "the working folder was removed; go to another folder" in result.stderr
