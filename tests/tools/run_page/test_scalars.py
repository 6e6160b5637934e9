from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from lit_lora.tools.run_page.scalars import read_curves


def test_a_damaged_event_file_is_named_and_an_unfinished_one_is_not(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(9):
            writer.add_scalar("loss", step / 8, step)
    [file] = tmp_path.iterdir()
    data = file.read_bytes()

    def read(changed: bytes) -> tuple[int, list[str]]:
        file.write_bytes(changed)
        notes: list[str] = []
        return len(read_curves(tmp_path, notes)["loss"]), notes

    assert read(data) == (9, [])
    assert read(data[:-5]) == (8, []), "as in a run that goes on"
    middle = len(data) // 2
    found, notes = read(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    assert found < 8
    assert notes == [f"{file.name} is damaged, and what follows the damage is not shown"]


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(b"loss,step\r\n0.25,1\r\n0.125,2\r\n0.0625,3")
    notes: list[str] = []
    assert read_curves(tmp_path, notes) == {"loss": [(2, 0.25), (3, 0.125)]}
    assert notes == []


def test_steps_are_counted_from_one_and_the_base_is_at_zero(tmp_path: Path) -> None:
    """Lightning logs the values of the first step at 0."""
    with SummaryWriter(str(tmp_path)) as writer:
        for name, step in (("val/loss", 0), ("val/loss", 4), ("train/loss", 0), ("train/loss", 4)):
            writer.add_scalar(name, 1.0, step)
    assert read_curves(tmp_path, []) == {"val/loss": [(0, 1.0), (5, 1.0)], "train/loss": [(1, 1.0), (5, 1.0)]}
