from __future__ import annotations

import csv
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_lora.datamodules.packing.row_file import RowFile
from lit_lora.errors import UserError

_VALUES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
_ROWS = st.lists(st.fixed_dictionaries({"a": _VALUES, "b,\t": _VALUES}), min_size=1, max_size=5)


def _write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="," if path.suffix == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("extension", ["jsonl", "csv", "tsv"])
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(rows=_ROWS)
def test_rows_are_found_again_where_they_start(tmp_path, extension, rows):
    path = tmp_path / f"x.{extension}"
    _write(path, rows)
    file = RowFile.open(path)
    assert file.columns() == list(rows[0])
    found = list(file.rows())
    assert [row for _, _, row in found] == rows
    assert [file.row(start) for start, _, _ in reversed(found)] == rows[::-1]


def test_byte_order_mark_blank_lines_and_long_fields(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbfa,b\r\n\r\n1," + b"x" * 200_000 + b"\r\n\r\n")
    file = RowFile.open(tmp_path / "x.csv")
    ((start, line, row),) = file.rows()
    assert (line, row) == (3, {"a": "1", "b": "x" * 200_000})
    assert file.row(start) == row


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"a,b\n1,2\n1,2,3\n", "line 3: 3 values, but the first line names 2 columns"),
        ("x.csv", b'a,b\n1,"2"3\n', "line 2: .* expected after"),
        ("x.csv", b'a,b\n1,"2\n', "line 2: unexpected end of data"),
        ("x.csv", b"a,b\n1,caf\xe9\n", "line 2: not UTF-8"),
        ("x.csv", b"a,a\n1,2\n", "names a column twice"),
        ("x.csv", b"", "has no first line that names its columns"),
        ("x.jsonl", b'{"a": 1}\n{', "line 2: not JSON"),
        ("x.jsonl", b"[1]\n", "line 1: not a JSON object"),
        ("x.jsonl", b"\n", "has no rows"),
    ],
)
def test_damage_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    file = RowFile.open(tmp_path / name)
    with pytest.raises(UserError, match=message):
        list(zip(file.columns(), file.rows(), strict=False)), list(file.rows())


def test_missing_or_changed_file(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*x.csv: No such file"):
        RowFile.open(tmp_path / "x.csv").columns()
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="changed while it was read"):
        RowFile.open(tmp_path / "x.jsonl").row(9)
