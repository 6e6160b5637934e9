from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lit_lora.datamodules.packing.pack import pack_folder
from lit_lora.datamodules.packing.pack_lock import only_pack_in
from lit_lora.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from lit_lora.datamodules.packing.pack_lock import only_pack_in
with only_pack_in(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path, encode_image):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(encode_image())
    (tmp_path / "images" / "a.txt").write_text("a")
    return tmp_path / "images"


def test_a_second_run_is_refused_and_leaves_the_first_alone(folder, tmp_path):
    out = tmp_path / "out"
    with only_pack_in(out):
        part = out / "shard-000000.tar.1-abc.part"
        part.write_bytes(b"of the first")
        with pytest.raises(UserError, match=rf"another run packs into .*out \(process {os.getpid()} on .*\); wait"):
            pack_folder(folder, out)
        assert part.read_bytes() == b"of the first"
        assert not (out / "plan.json").exists()
    assert pack_folder(folder, out).samples == 1
    assert not (out / "pack.lock").exists()
    assert not part.exists()


def test_the_lock_of_a_killed_process_is_free(folder, tmp_path):
    out = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on"):
            pack_folder(folder, out)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert (out / "pack.lock").exists()
    assert pack_folder(folder, out).samples == 1
    assert not (out / "pack.lock").exists()
