from __future__ import annotations

import numpy as np

from lit_lora.profiling.rank_chart import rank_chart

NOW, FIRST = (0, 0x72, 0xB2), (0xDD, 0xDD, 0xDD)


def test_bars_are_as_long_as_the_ranks() -> None:
    image = np.asarray(rank_chart({"a.to_q": (8, 16), "a.to_k": (16, 16), "b.to_q": (0, 4)}, "ranks"))
    body = image[90:-20, 430:]

    def pixels(row: int, color: tuple[int, int, int]) -> int:
        return int((body[row * 18 + 9] == color).all(-1).sum())

    full = pixels(1, NOW)
    assert pixels(0, NOW) == pixels(0, FIRST) + 1 == full // 2 + 1
    assert pixels(1, FIRST) == 0
    assert abs(pixels(2, FIRST) - full / 4) <= 2


def test_hundreds_of_layers_fit_one_image() -> None:
    chart = rank_chart({f"blocks.{number}.to_q": (1, 2) for number in range(800)}, "ranks")
    assert chart.size == (1120, 90 + 2 * 800 + 20)
    long = rank_chart({"x" * 300: (1, 2)}, "ranks")
    assert (np.asarray(long)[100, :8] == 255).all()  # the name is cut
