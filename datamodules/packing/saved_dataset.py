"""Packing of a data set that ``datasets`` has saved."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lit_lora.datamodules.packing.arrow import ArrowFile
from lit_lora.datamodules.packing.column_table import ColumnTable
from lit_lora.errors import UserError
from lit_lora.visible import visible

if TYPE_CHECKING:
    from lit_lora.datamodules.packing.source import PackSource


@dataclass(frozen=True, eq=False, kw_only=True)
class SavedDataset(ColumnTable):
    """Rows of a folder that ``datasets.Dataset.save_to_disk`` has written, or of one of its Arrow files."""

    extensions = ("arrow",)

    @classmethod
    def find(cls, source: PackSource) -> ColumnTable | None:
        folder = source.folder
        if source.is_file:
            paths = list(source.files.get("arrow", ()))
        elif (folder / "dataset_dict.json").is_file():
            splits = ", ".join(visible(path.parent) for path in sorted(folder.glob("*/state.json")))
            raise UserError(f"{visible(folder)} contains several splits; pack one of them: {splits}")
        else:
            paths = _listed_files(folder) if (folder / "state.json").is_file() else []
        return cls.of(folder, [ArrowFile(path) for path in paths], **source.column_options) if paths else None


def _listed_files(folder: Path) -> list[Path]:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        paths = [folder / entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{visible(folder / 'state.json')} does not list the files of a saved data set; save it again"
        ) from error
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(
            f"{visible(missing[0])}, which {visible(folder / 'state.json')} lists, is missing; save the data set again"
        )
    return paths
