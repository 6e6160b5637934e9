"""The list of measurements that need a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import LONGEST, SLICES, Slice, run, state


def test_a_result_is_missing_then_up_to_date_then_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code.py").write_text("a = 1")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    one = Slice("one", ("-c", "print('half\\rwhole')"), ("code.py",))
    out = tmp_path / "out"
    assert state(one, out) == "missing"
    assert run(one, out, LONGEST) == "done"
    text = (out / "one.txt").read_text()
    assert text.endswith("\n\nwhole\n"), "what a progress bar wrote over is left out"
    assert "command: python -c " in text
    assert "versions: torch " in text
    assert state(one, out) == "up to date"
    (tmp_path / "code.py").write_text("a = 2")
    assert state(one, out) == "older than the code"


@pytest.mark.parametrize(
    ("code", "seconds", "status"),
    [
        ("print('names'); raise SystemExit(3)", LONGEST, "3"),
        ("import time; print('names'); time.sleep(60)", 1.5, "ended after 2 s"),
    ],
)
def test_what_a_failed_slice_printed_is_kept(code: str, seconds: float, status: str, tmp_path: Path) -> None:
    one = Slice("one", ("-c", code), ())
    assert run(one, tmp_path, seconds) == f"failed ({status})"
    assert (tmp_path / "one.txt").read_text().endswith("\n\nnames\n")
    assert state(one, tmp_path) == f"failed ({status})"


def test_every_slice_exists_and_every_gpu_test_is_in_one() -> None:
    assert len({one.name for one in SLICES}) == len(SLICES)
    for one in SLICES:
        for name in one.code:
            assert (gpu.ROOT / name).exists(), name
    chosen = [one.command[-1] for one in SLICES if one.name.startswith("tests")]
    words = {word for part in chosen for word in part.split() if word not in ("not", "and", "or")}
    assert words == {"strategies", "deepspeed", "compiled"}, "each word is left out of the first and chosen by another"
