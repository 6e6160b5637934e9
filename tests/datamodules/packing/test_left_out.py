from __future__ import annotations

import json

from lit_lora.datamodules.packing.left_out import BadFile, count_files, format_reasons, list_first, write_left_out


def test_reasons_are_counted_and_the_first_file_of_each_is_named():
    files = [BadFile("a", "r"), BadFile("b\n", "s", 5), BadFile("c", "r")]
    assert count_files(files) == 7
    assert format_reasons(files) == ["  5  b\\n: s", "  2  a: r"]
    many = format_reasons(BadFile(str(number), str(number)) for number in range(20))
    assert (len(many), many[-1]) == (13, "  … and 8 more reasons")


def test_the_first_files_of_an_error():
    assert list_first([BadFile("a\x1b", "r")]) == "\n  a\\x1b: r"
    assert list_first([BadFile(str(n), "r") for n in range(12)]).splitlines()[-1] == "  … and 2 more"


def test_the_file_holds_names_as_they_are(tmp_path):
    write_left_out(tmp_path / "bad.jsonl", [BadFile("b\x1b\n\udce9", "r"), BadFile("a", "s", 3)])
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert lines == [{"file": "a", "reason": "s", "count": 3}, {"file": "b\x1b\n\udce9", "reason": "r"}]
