from __future__ import annotations

from PIL import Image

from lit_lora.tools.labelled_grid import labelled_grid


def test_each_image_is_in_its_row_and_column() -> None:
    colors = [["red", "blue"], ["lime", "yellow"]]
    rows = [[Image.new("RGB", (140, 20 + 30 * i), color) for color in row] for i, row in enumerate(colors)]
    sheet = labelled_grid(rows, ["one", "a" * 60], ["a prompt " * 30, "b"])
    found = {}
    for row in colors:
        for color in row:
            own = Image.new("RGB", (1, 1), color).getpixel((0, 0))
            places = [(x, y) for y in range(sheet.height) for x in range(sheet.width) if sheet.getpixel((x, y)) == own]
            found[color] = (*places[0], len(places))
    assert found["red"][:1] == found["lime"][:1] < found["blue"][:1] == found["yellow"][:1]
    assert found["red"][1] == found["blue"][1] < found["lime"][1] == found["yellow"][1]
    assert [found[color][2] for color in ("red", "blue", "lime", "yellow")] == [2800, 2800, 7000, 7000]
    assert sheet.size == (140 + 16 + 2 * 148, found["lime"][1] + 50 + 8)
