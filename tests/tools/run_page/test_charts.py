from __future__ import annotations

import re

import pytest

from lit_lora.tools.run_page.charts import Line, line_chart, stacked_bars


def test_a_line_goes_through_its_points() -> None:
    chart = line_chart([Line("loss", [(0, 0.0), (10, 1.0)], "")], ("level", 0.5))
    assert 'd="M58.0 226.0L466.0 12.0"' in chart  # from corner to corner
    assert '<path class="level" d="M58 119.0H466"/>' in chart
    assert "<title>step 10: 1</title>" in chart
    assert "level: 0.5" in chart


@pytest.mark.parametrize("value", [0.0, 5.0, -2.0, 1e-9, 3e12])
def test_one_point_and_equal_values_have_an_axis(value: float) -> None:
    for points in ([(3, value)], [(1, value), (2, value)]):
        chart = line_chart([Line("x", points, "")])
        numbers = [float(one) for one in re.findall(r'cy="(-?[\d.]+)"', chart)]
        assert numbers
        assert all(12 <= one <= 226 for one in numbers)


def test_a_line_that_is_alone_needs_no_key() -> None:
    points = [(0, 0.0), (1, 1.0)]
    assert "<li>" not in line_chart([Line("loss", points, "")])
    assert line_chart([Line("a", points, ""), Line("b", points, "")]).count("<li>") == 2
    assert line_chart([Line("a", points, "")], ("level", 0.5)).count("<li>") == 2


def test_long_lines_are_means() -> None:
    chart = line_chart([Line("loss", [(i, float(i % 2)) for i in range(1000)], "")])
    assert "each point is the mean of 5 values" in chart
    assert chart.count("L") == 199


def test_bars_are_as_long_as_their_kinds() -> None:
    chart = stacked_bars([("forward", {"adapter": 2 * 10**9, "activations": 10**9}), ("<b>", {"": 10**9})])
    assert [float(one) for one in re.findall(r'<rect x="[\d.]+" y="\d+" width="([\d.]+)"', chart)] == [
        164.0,
        82.0,
        82.0,
    ]
    assert "3.0 GB" in chart
    assert "&lt;b&gt;" in chart
    assert "<b>" not in chart
