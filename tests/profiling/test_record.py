from __future__ import annotations

from lit_lora.profiling.kinds import KINDS
from lit_lora.profiling.record import MemoryRecord, PhaseMemory

GIB = 1 << 30


def test_the_table_fits_a_hundred_columns() -> None:
    """With one kind of peak, for bases of tens of gigabytes."""
    record = MemoryRecord()
    for name in ("load", "validation", "between"):
        kinds = dict.fromkeys(KINDS, 9 * GIB) | {"frozen weights": 24 * GIB}
        record.add(name, PhaseMemory({"resident": 60 * GIB}, {"resident": 30 * GIB}, kinds, step=1))
    head, *rows = record.table().splitlines()
    assert " ".join(head.split()) == "phase peak at end frozen adapter gradients optimizer activations other times"
    assert rows[0].split()[:4] == ["load", "61,440.0", "30,720.0", "24,576.0"]
    assert all(len(row) <= 100 for row in (head, *rows))
