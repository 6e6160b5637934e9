from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from lit_lora.datamodules.staging import slot as slot_module
from lit_lora.datamodules.staging.slot import StagerSlot
from lit_lora.machine import host, is_alive


@pytest.fixture
def ended():
    """Id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@contextmanager
def _held(folder, **owner):
    """Slot 0, claimed by an owner; yields the function that releases it."""
    slot = folder / "lit_lora-slot-0"
    slot.mkdir()
    with (slot / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(json.dumps(owner))
        lock.flush()
        yield lambda: fcntl.flock(lock, fcntl.LOCK_UN)


def test_first_free_slot_is_taken(tmp_path):
    slots = [StagerSlot.claim(tmp_path, os.getpid()) for _ in range(3)]
    assert [slot.number for slot in slots] == [0, 1, 2]
    assert [slot.path for slot in slots] == sorted(tmp_path.iterdir())


def test_slot_whose_owner_is_about_to_end_is_waited_for(tmp_path, ended):
    with _held(tmp_path, host=host(), pid=os.getpid(), parent=ended) as release:
        timer = threading.Timer(0.1, release)
        timer.start()
        assert StagerSlot.claim(tmp_path, os.getpid()).number == 0
        timer.join()


@pytest.mark.parametrize("owner", [{"host": "another", "parent": 1}, {"host": host(), "parent": os.getpid()}, {}])
def test_slot_in_use_is_left_alone(tmp_path, owner):
    with _held(tmp_path, **owner):
        assert StagerSlot.claim(tmp_path, os.getpid()).number == 1


def test_waiting_for_an_owner_has_an_end(tmp_path, ended, monkeypatch):
    monkeypatch.setattr(slot_module, "_ORPHAN_WAIT_S", 0.0)
    with _held(tmp_path, host=host(), pid=os.getpid(), parent=ended):
        assert StagerSlot.claim(tmp_path, os.getpid()).number == 1


def test_process_that_nobody_has_waited_for_has_ended():
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as process:
        process.stdout.read()  # its end
        while is_alive(process.pid):
            pass
        assert process.returncode is None
    assert not is_alive(process.pid)
    assert is_alive(os.getpid())
    assert is_alive(1)


def test_files_that_a_download_renames_while_they_are_cleaned_up(tmp_path, monkeypatch):
    slot = StagerSlot.claim(tmp_path, os.getpid())
    parts = [slot.path / f"0123456789abcdef-{number}.tar.part" for number in range(2)]
    for part in parts:
        part.touch()
    unlink = os.unlink

    def rename_first(path):
        path = Path(path)
        if path == parts[0]:
            path.rename(path.with_suffix(""))
        unlink(path)

    monkeypatch.setattr(os, "unlink", rename_first)
    slot.clean()
    assert sorted(path.name for path in slot.path.iterdir()) == ["0123456789abcdef-0.tar", "lock"]


def test_the_states_of_shards_that_are_gone_are_removed(tmp_path):
    slot = StagerSlot.claim(tmp_path, os.getpid())
    kept = ["0123456789abcdef-0.tar", "state-0123456789abcdef"]
    for name in (*kept, "state-fedcba9876543210"):
        (slot.path / name).touch()
    slot.clean()
    assert sorted(path.name for path in slot.path.iterdir()) == [*kept[:1], "lock", *kept[1:]]


def test_what_an_owner_left_is_removed_unless_there_is_another(tmp_path):
    with _held(tmp_path, host=host(), pid=os.getpid(), parent=os.getpid()) as release:
        slot = StagerSlot(tmp_path, 0)
        part = slot.path / "0123456789abcdef-0.tar.part"
        part.touch()
        slot.clean_after_owner()
        assert part.exists()
        release()
        slot.clean_after_owner()
        assert not part.exists()
        assert slot._take(os.getpid())  # the lock is free again
