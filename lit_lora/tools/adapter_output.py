"""Where the commands of ``lit-lora adapter`` write adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lit_lora.errors import UserError
from lit_lora.files import atomic_file, atomic_folder, writable_folder
from lit_lora.formats import DEFAULT_FORMATS, AdapterFiles, AdapterFormat, format_named, write_card


@dataclass(frozen=True)
class AdapterOutput:
    """The file or folder for an adapter.

    Args:
        target: File with the ending .safetensors, or folder.
        format: Name of the format. Defaults to None: a folder gets the files of PEFT and of diffusers, as far as they can hold
            the adapter; a file is that of diffusers.
        overwrite: Whether to replace an adapter at the target. Defaults to False.

    Raises:
        UserError: If the target exists, or is a file and the format is a folder.
    """

    target: Path
    format: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        refuse_existing(self.target, self.overwrite)
        if self.is_file and self.format == "peft":
            raise UserError(
                f"output={str(self.target)!r} is a file, and the format peft is a folder of two; name a folder"
            )

    @property
    def is_file(self) -> bool:
        """Whether the target is a file."""
        return self.target.suffix == ".safetensors"

    def formats(self, adapter: AdapterFiles) -> list[AdapterFormat]:
        """The formats in which an adapter is written.

        Raises:
            UserError: If none can hold the adapter.
        """
        named = [self.format] if self.format else ["diffusers"] if self.is_file else list(DEFAULT_FORMATS)
        candidates = [format_named(name) for name in named]
        found = [one for one in candidates if one.holds(adapter)]
        if not found:
            one = candidates[0]
            advice = "; name the model family of its base with --family" if adapter.family is None else ""
            raise UserError(
                f"the adapter cannot be written in the format {one.name}: {one.why_not(adapter)}{advice}; or name another "
                f"--format or a folder"
            )
        return found

    def write(self, adapter: AdapterFiles) -> None:
        """Write an adapter.

        Raises:
            OSError: If the disk is full or the folder cannot be written.
            UserError: If the format cannot hold it.
        """
        formats = self.formats(adapter)
        if self.is_file:
            with atomic_file(self.target) as part, self._beside() as folder:
                formats[0].write(adapter, folder)
                (folder / formats[0].file_name).replace(part)
        else:
            with atomic_folder(self.target, marker=formats[0].file_name) as part:
                for one in formats:
                    one.write(adapter, part)
                write_card(adapter, part)

    def size(self, adapter: AdapterFiles) -> int:
        """Size of the largest file into which an adapter would be written, in bytes."""
        largest = 0
        for one in self.formats(adapter):
            with self._beside() as folder:
                one.write(adapter, folder)
                largest = max(largest, *(file.stat().st_size for file in folder.rglob("*.safetensors")))
        return largest

    @contextmanager
    def _beside(self) -> Iterator[Path]:
        writable_folder(self.target.parent)
        with TemporaryDirectory(dir=self.target.parent, prefix=f".{self.target.name}.") as folder:
            yield Path(folder)


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Refuse to write where something is.

    Args:
        target: File or folder to write.
        overwrite: Whether the user allows it.

    Raises:
        UserError: If the target exists and may not be overwritten.
    """
    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists; name another output, or set --overwrite")
