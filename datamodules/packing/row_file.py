"""Text files with one sample per row."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from lit_lora.errors import UserError
from lit_lora.files import check_regular
from lit_lora.unique_keys import load_json
from lit_lora.visible import visible

ROW_EXTENSIONS = ("jsonl", "csv", "tsv")

_MAX_FIELD = 1 << 30  # characters; the default of csv is too low for long captions
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RowFile(ABC):
    """A text file whose rows can be read again from their start.

    Attributes:
        path: Path of the file.
    """

    path: Path

    @staticmethod
    def open(path: Path) -> RowFile:
        """The row file of the kind that its extension names: jsonl, csv or tsv.

        Raises:
            UserError: If it is a pipe or a device.
        """
        with suppress(OSError):  # reading it says so
            check_regular(path)
        return JsonLines(path) if path.suffix.lower() == ".jsonl" else DelimitedFile(path)

    def rows(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Yield the offset of each row in bytes, its line number, and its values by column.

        Raises:
            UserError: If the file or one of its rows cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                yield from self._parse(_Lines(self.path, file))
        except OSError as error:
            raise _unreadable(self.path, error) from error

    @abstractmethod
    def columns(self) -> list[str]:
        """Names of all columns of the file.

        Raises:
            UserError: As for :meth:`rows`.
        """

    def row(self, start: int) -> dict[str, Any]:
        """Values by column of the row that starts at this byte.

        Raises:
            UserError: As for :meth:`rows`, or if the file has changed.
        """
        try:
            with self.path.open("rb") as file:
                found = next(self._parse(_Lines(self.path, file, start)), None)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if found is None:
            raise UserError(f"{visible(self.path)} changed while it was read; start again")
        return found[2]

    @abstractmethod
    def _parse(self, lines: _Lines) -> Iterator[tuple[int, int, dict[str, Any]]]: ...


class JsonLines(RowFile):
    """A file with one JSON object per line."""

    def columns(self) -> list[str]:
        names = list(dict.fromkeys(name for _, _, row in self.rows() for name in row))
        if not names:
            raise UserError(f"{visible(self.path)} has no rows; name another file")
        return names

    def _parse(self, lines: _Lines) -> Iterator[tuple[int, int, dict[str, Any]]]:
        for line in lines:
            if not line.strip():
                continue
            try:
                row = load_json(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{visible(self.path)}, line {lines.number}: not JSON ({visible(error)}); correct the line"
                ) from error
            if not isinstance(row, dict):
                raise UserError(
                    f"{visible(self.path)}, line {lines.number}: not a JSON object with names of columns; correct the line"
                )
            yield lines.start, lines.number, row


class DelimitedFile(RowFile):
    """A file of comma-separated (in a ``.tsv``, tab-separated) values, whose first line names the columns."""

    def columns(self) -> list[str]:
        return self._names

    def _parse(self, lines: _Lines) -> Iterator[tuple[int, int, dict[str, Any]]]:
        start = lines.end
        for row in self._values(lines):
            if row and start:  # the first row is the names
                yield start, lines.number, self._row(row, lines.number)
            start = lines.end

    @cached_property
    def _names(self) -> list[str]:
        try:
            with self.path.open("rb") as file:
                names = next(self._values(_Lines(self.path, file)), None)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if not names:
            raise UserError(f"{visible(self.path)} has no first line that names its columns; add one")
        if len(set(names)) < len(names):
            raise UserError(
                f"{visible(self.path)} names a column twice in its first line, {', '.join(map(visible, names))}; rename one"
            )
        return names

    def _values(self, lines: _Lines) -> Iterator[list[str]]:
        csv.field_size_limit(_MAX_FIELD)
        delimiter = "\t" if self.path.suffix.lower() == ".tsv" else ","
        try:
            yield from csv.reader(lines, delimiter=delimiter, strict=True)
        except csv.Error as error:
            raise UserError(f"{visible(self.path)}, line {lines.number}: {visible(error)}; correct the line") from error

    def _row(self, values: list[str], line: int) -> dict[str, Any]:
        if len(values) != len(self._names):
            raise UserError(
                f"{visible(self.path)}, line {line}: {len(values)} values, but the first line names {len(self._names)} columns;"
                " correct the line"
            )
        return dict(zip(self._names, values, strict=True))


class _Lines:
    """The lines of a file as text, with number, start and end of the last line that was read."""

    def __init__(self, path: Path, file: BinaryIO, start: int = 0) -> None:
        file.seek(start)
        self.number = 0
        self.start = self.end = start
        self._path = path
        self._file = file

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.number += 1
            self.start, self.end = self.end, self.end + len(line)
            try:
                yield (line.removeprefix(_BYTE_ORDER_MARK) if self.start == 0 else line).decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{visible(self._path)}, line {self.number}: not UTF-8 (byte {error.start} of the line); save it as UTF-8"
                ) from error


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot read {visible(path)}: {error.strerror}; check its name")
