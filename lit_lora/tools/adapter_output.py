"""Where the commands of ``lit-lora adapter`` write adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lit_lora.errors import UserError
from lit_lora.files import atomic_file, atomic_folder, check_place, writable_folder
from lit_lora.formats import DEFAULT_FORMATS, AdapterFiles, AdapterFormat, format_named, write_card, write_embeddings

_OTHER_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".sft", ".gguf", ".onnx")
"""Endings of files of weights that are not written."""


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
        check_free(self.target, self.overwrite)
        check_target(self.target, self.format)

    def formats(self, adapter: AdapterFiles) -> list[AdapterFormat]:
        """The formats in which an adapter is written.

        Raises:
            UserError: If none can hold the adapter.
        """
        named = [self.format] if self.format else ["diffusers"] if is_file(self.target) else list(DEFAULT_FORMATS)
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
        if is_file(self.target):
            write_file(adapter, formats[0], self.target)
        else:
            with atomic_folder(self.target, marker=formats[0].file_name) as part:
                for one in formats:
                    one.write(adapter, part)
                write_embeddings(adapter, part)
                write_card(adapter, part)

    def size(self, adapter: AdapterFiles) -> int:
        """Size of the largest file into which an adapter would be written, in bytes."""
        largest = 0
        for one in self.formats(adapter):
            with _folder_beside(self.target) as folder:
                one.write(adapter, folder)
                largest = max(largest, *(file.stat().st_size for file in folder.rglob("*.safetensors")))
        return largest


def is_file(target: Path) -> bool:
    """Whether the target of an adapter is a file, not a folder."""
    return target.suffix == ".safetensors"


def check_target(target: Path, format_name: str | None) -> None:
    """Check that a format can be written to a target, and that its name does not promise another kind of file.

    Args:
        target: File or folder to write.
        format_name: Name of the format; None if it is open.

    Raises:
        UserError: If the target is a file and the format is a folder, or it has the ending of weights of other kinds.
    """
    if target.suffix.lower() in _OTHER_WEIGHTS:
        raise UserError(
            f"output={str(target)!r} has the ending {target.suffix}, and adapters are written as files with the ending "
            ".safetensors, or folders; name one of these"
        )
    if is_file(target) and format_name == "peft":
        raise UserError(
            f"output={str(target)!r} is a file, and the format peft is a folder of two; name a folder, or another --format"
        )


def write_file(adapter: AdapterFiles, one: AdapterFormat, target: Path) -> None:
    """Write an adapter as a single file, atomically.

    Args:
        adapter: Adapter that the format can hold.
        one: Format of one file.
        target: File to write.

    Raises:
        OSError: If the disk is full or the folder cannot be written.
        UserError: If the adapter has new tokens, for which the file has no place.
    """
    if adapter.new_tokens:
        raise UserError(
            f"{target} would lose the new tokens {', '.join(adapter.new_tokens)}, which have files of their own: name a folder, "
            f"or give a single file of the adapter as input, such as pytorch_lora_weights.safetensors"
        )
    with atomic_file(target) as part, _folder_beside(target) as folder:
        one.write(adapter, folder)
        (folder / one.file_name).replace(part)


@contextmanager
def _folder_beside(target: Path) -> Iterator[Path]:
    writable_folder(target.parent)
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        yield Path(folder)


def check_free(target: Path, overwrite: bool) -> None:
    """Check, before any work, that a target can be written.

    Args:
        target: File or folder to write.
        overwrite: Whether an existing target may be replaced.

    Raises:
        UserError: If the target exists and may not be replaced, or the nearest folder that exists cannot be written.
    """
    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists; name another output, or set --overwrite")
    check_place(target)
