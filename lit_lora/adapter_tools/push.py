"""Uploads an adapter to the hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in __all__

from lit_lora.errors import UserError
from lit_lora.formats import FORMATS, AdapterFiles
from lit_lora.formats.card import CARD, model_card
from lit_lora.formats.peft import CONFIG, WEIGHTS
from lit_lora.formats.textual_inversion import FOLDER

_HERE = '"this folder"'
"""How a model card beside the files names their place."""


@dataclass(frozen=True)
class Upload:
    """What would be uploaded.

    Args:
        repository: Id of the repository, ``NAME`` or ``USER/NAME``.
        files: Files by their path in the repository, without the model card.
        card: Text of the model card.
    """

    repository: str
    files: dict[str, Path]
    card: str

    @classmethod
    def of(cls, adapter: AdapterFiles, path: Path, repository: str) -> Upload:
        """The files of an adapter that belong on the hub, and its model card.

        Of a folder these are the files of all formats, sample images in ``samples`` and its model card, which says how to load
        the adapter from the repository. Without a card one is made.

        Args:
            adapter: Adapter.
            path: File or folder that it was read from.
            repository: Id of the repository.

        Raises:
            UserError: If the id is not one that the hub takes, or the path is one of PEFT's files alone.
        """
        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            raise UserError(
                f"{repository!r} is not the id of a repository on the hub ({error}); give USER/NAME"
            ) from error
        if path.name == WEIGHTS and not path.is_dir():
            raise UserError(f"{path} is of no use without the files beside it; name their folder, {path.parent}")
        files = dict(_files(path))
        written = path / CARD
        if path.is_dir() and written.is_file():
            card = written.read_text(encoding="utf-8")
        else:
            card = model_card(adapter, sorted(files), [name for name in files if name.endswith(".png")])
        return cls(repository, files, card.replace(_HERE, f'"{repository}"'))

    def sizes(self) -> dict[str, int]:
        """Sizes of all files in bytes, by their path in the repository."""
        return {CARD: len(self.card.encode())} | {name: path.stat().st_size for name, path in self.files.items()}

    def push(self, private: bool, message: str) -> str:
        """Create the repository unless it exists, and upload the files in one commit.

        Args:
            private: Whether a new repository is private.
            message: Message of the commit.

        Returns:
            Address of the repository.

        Raises:
            UserError: If nobody is logged in, the hub refuses, or it cannot be reached.
        """
        api = HfApi(endpoint=constants.ENDPOINT)
        login = "log in with hf auth login as a user who may write there"
        try:
            created = api.create_repo(self.repository, private=private, exist_ok=True)
            with TemporaryDirectory() as folder:
                for name, path in self.files.items():
                    (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                    (Path(folder) / name).symlink_to(path.resolve())
                (Path(folder) / CARD).write_text(self.card, encoding="utf-8")
                api.upload_folder(repo_id=created.repo_id, folder_path=folder, commit_message=message)
        except LocalTokenNotFoundError as error:
            raise UserError(f"nobody is logged in to {constants.ENDPOINT}; {login}") from error
        except HfHubHTTPError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"the hub refuses the upload to {self.repository}: {reason}; {login}") from error
        except OfflineModeIsEnabled as error:
            raise UserError("HF_HUB_OFFLINE is set, and an upload needs the hub; unset it") from error
        except OSError:
            raise
        except Exception as error:  # the HTTP library differs between versions of huggingface_hub
            cause = error.__cause__ or error
            raise UserError(
                f"the upload to {constants.ENDPOINT} failed ({cause}); check the network and try again"
            ) from error
        return str(created)


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """The files of an adapter by their path in the repository."""
    if not path.is_dir():
        yield path.name, path
        return
    patterns = [CONFIG, *(one.file_name for one in FORMATS), f"text_encoder*/{WEIGHTS}", f"text_encoder*/{CONFIG}"]
    patterns.append(f"{FOLDER}/*.safetensors")
    found = {file for pattern in (*patterns, "samples/*.png") for file in path.glob(pattern) if file.is_file()}
    if not any(file.suffix == ".safetensors" for file in found):  # another name, as read_adapter takes it
        found |= set(path.glob("*.safetensors"))
    yield from ((file.relative_to(path).as_posix(), file) for file in sorted(found))
