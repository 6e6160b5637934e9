"""Freed memory goes back to the system in a context, and only there."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tests.job_run import REPOSITORY

PROGRAM = """
from contextlib import nullcontext
from benchmarks.process_memory import resident
from lit_lora.freed_memory import given_back

del (first := [bytearray(30_000_000)])[:]  # from then on glibc keeps freed blocks of up to this size
for context in (given_back(), nullcontext()):
    large, small = [], []
    with context:
        for _ in range(200):
            large.append(bytearray(b"x") * 200_000)
            small.append(bytearray(b"x") * 60_000)
        before = resident()
        large.clear()
        print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_freed_memory_is_given_back() -> None:
    """In a process of its own, since blocks that are free already are used first."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    given, kept = map(int, done.stdout.split())
    assert given > 30_000_000
    assert kept < 10_000_000
