from __future__ import annotations

import pytest

from lit_lora.profiling.kinds import KINDS
from lit_lora.profiling.record import MemoryRecord, PhaseMemory

GIB = 1 << 30


@pytest.mark.parametrize("measures", [("resident",), ("allocated", "reserved")])
def test_the_table_fits_eighty_columns(measures: tuple[str, ...]) -> None:
    """Also with CUDA's two measures, for bases of tens of gigabytes, and with phases of long names."""
    record = MemoryRecord()
    for name in ("load", "validation", "between", "phase_of_the_user"):
        kinds = dict.fromkeys(KINDS, 9 * GIB) | {"frozen weights": 129 * GIB, "other": 3 << 20}
        peak = dict.fromkeys(measures, 130 * GIB)
        record.add(name, PhaseMemory(peak, dict.fromkeys(measures, 30 * GIB), kinds, step=1, count=100_000))
    head, *rows = record.table().splitlines()
    shown = "peak" if len(measures) == 1 else "alloca reserv"
    assert " ".join(head.split()) == f"phase {shown} at end frozen adapt. grads optim. activ. other times"
    sizes = ["133120"] * len(measures)
    assert rows[0].split() == ["load", *sizes, "30,720", "132096", "9,216", "9,216", "9,216", "9,216", "3.0", "100000"]
    assert rows[2].split()[0] == "phase_of_…"
    assert all(len(row) <= 80 for row in (head, *rows))
