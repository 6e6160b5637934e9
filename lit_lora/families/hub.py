"""Repositories on the hub, and their local copies."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lit_lora.errors import UserError

_SECONDS_FOR_THE_HUB = 10


@lru_cache
def check_hub(repository: str, revision: str | None) -> None:
    """Check that a repository can be loaded: from the local copy of an earlier download, or from the hub.

    The libraries that load the parts would try each file for a while and report the first that is missing.

    Args:
        repository: Id of the repository.
        revision: Branch, tag or commit; None for the default branch.

    Raises:
        UserError: If there is no local copy, and the hub cannot be reached or has no such repository.
    """
    advice = "name a local folder that diffusers' save_pretrained wrote, or correct pretrained_model_name_or_path"
    try:
        if isinstance(try_to_load_from_cache(repository, "model_index.json", revision=revision), str):
            return
        HfApi(endpoint=constants.ENDPOINT).model_info(repository, revision=revision, timeout=_SECONDS_FOR_THE_HUB)
    except HFValidationError as error:
        raise UserError(
            f"{repository!r} is neither a folder nor the id of a repository on the hub; {advice}"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        shown = repository if revision is None else f"{repository}@{revision}"
        raise UserError(f"the hub has no repository {shown}, or it needs a login (hf auth login); {advice}") from error
    except Exception as error:  # the HTTP library differs between versions of huggingface_hub
        if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code < 500:
            raise UserError(f"the hub refuses {repository!r}: {error}; {advice}") from error
        raise UserError(
            f"{repository!r} is not on this machine, and the hub {constants.ENDPOINT} cannot be reached ({error}); check the "
            f"network, or {advice}"
        ) from error


@lru_cache
def repository_files(repository: str, revision: str | None) -> tuple[str, ...]:
    """Names of a repository's files: those on the hub, or without a connection those of the local copy.

    Args:
        repository: Id of the repository.
        revision: Branch, tag or commit; None for the default branch.
    """
    try:
        info = HfApi(endpoint=constants.ENDPOINT).model_info(
            repository, revision=revision, timeout=_SECONDS_FOR_THE_HUB
        )
        return tuple(file.rfilename for file in info.siblings or ())
    except Exception:  # the HTTP library differs between versions of huggingface_hub
        try:
            copy = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            return ()
        return tuple(file.relative_to(copy).as_posix() for file in copy.rglob("*"))
