"""Memory that a process can get."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from lit_lora.machine import available_memory

MB = 1_000_000


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("memory_", "memory.")).write_text(f"{content}\n")


def test_files_in_memory_count_as_free() -> None:
    # MemFree of a machine that has copied a data set is near zero.
    assert available_memory() > 0.5 * psutil.virtual_memory().available


@pytest.mark.parametrize(("job", "expected"), [("max", 700), (900 * MB, 600), (100 * MB, 0)])
def test_limits_of_control_groups(job: object, expected: int, tmp_path: Path) -> None:
    write(tmp_path / "proc" / "self", cgroup="0::/slurm/job_3/task_0")
    groups = tmp_path / "sys" / "fs" / "cgroup"
    write(groups / "slurm" / "job_3" / "task_0", memory_max="max", memory_current=5 * MB)
    write(
        groups / "slurm" / "job_3",
        memory_max=job,
        memory_current=400 * MB,
        memory_stat=f"file 1\ninactive_file {100 * MB}",
    )
    write(groups / "slurm", memory_max=1100 * MB, memory_current=400 * MB)
    assert available_memory(tmp_path) == expected * MB


def test_limits_of_the_first_version(tmp_path: Path) -> None:
    write(tmp_path / "proc" / "self", cgroup="5:cpu:/other\n4:hugetlb,memory:/docker/a")
    groups = tmp_path / "sys" / "fs" / "cgroup" / "memory"
    stat = f"inactive_file 1\ntotal_inactive_file {20 * MB}"
    write(groups, memory_limit_in_bytes=300 * MB, memory_usage_in_bytes=100 * MB, memory_stat=stat)
    assert available_memory(tmp_path) == 220 * MB


def test_a_machine_without_control_groups(tmp_path: Path) -> None:
    assert available_memory(tmp_path) > MB
    write(tmp_path / "proc" / "self", cgroup="0::/")
    assert available_memory(tmp_path) > MB
