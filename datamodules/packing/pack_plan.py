"""The plan beside packed shards: what they were made of, so that an interrupted run continues."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_lora.datamodules.indexing.data_index import INDEX_NAME
from lit_lora.datamodules.indexing.manifest import MANIFEST
from lit_lora.errors import UserError
from lit_lora.files import atomic_file, remove_parts
from lit_lora.visible import visible

PLAN = "plan.json"
"""The file that tells what the shards are made of."""

_BESIDE = (PLAN, MANIFEST, INDEX_NAME, "bad.jsonl", "shardindex.json", "sizes.json")
"""Files beside the shards."""


class OtherShardsError(UserError):
    """A folder holds shards of other files or options than those to pack."""


def claim(out: Path, shards: Sequence[Path], fingerprint: str, options: Sequence[object]) -> None:
    """Check that the shards in a folder belong to the same plan, and write the plan.

    Shards of an unfinished run with the same source and options but other files, for example with bad files that have been
    repaired, are removed.

    Args:
        out: Folder of the shards, which is locked.
        shards: Paths of all shards, existing or not.
        fingerprint: A text that changes when the samples or their files change.
        options: The source and all options that change the shards.

    Raises:
        OtherShardsError: If the folder contains shards of other files or options.
        UserError: If it contains shards that were not packed.
    """
    plan = {
        "format": "lit_lora.pack_plan",
        "version": 3,
        "shards": [shard.name for shard in shards],
        "fingerprint": _digest([fingerprint, *options[1:]]),
        "options": _digest(list(options)),
    }
    found = _read(out / PLAN)
    if found is not None and found["fingerprint"] != plan["fingerprint"]:
        is_repaired = found["options"] == plan["options"] and not (out / MANIFEST).exists()
        if not is_repaired and any(out.glob("*.tar")):
            raise OtherShardsError(
                f"{visible(out)} holds shards of other files or options; name another output folder or empty this one"
            )
        _remove(out, found["shards"])
        found = None
    if found is None:
        if any(out.glob("*.tar")):
            raise UserError(f"{visible(out)} holds shards that were not packed here; name another output folder")
        write_json(out / PLAN, plan)
    remove_left_overs(out, shards)


def remove_left_overs(out: Path, shards: Sequence[Path]) -> None:
    """Remove temporary files of killed runs; nobody may be writing to the folder.

    Args:
        out: Folder of the shards, which is locked.
        shards: Paths of all shards.
    """
    remove_parts([*shards, *(out / name for name in _BESIDE)])


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    with atomic_file(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        texts = (found["fingerprint"], found.setdefault("options", ""))
        names = found["shards"] if isinstance(found["shards"], list) else []
        found["shards"] = [Path(name).name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{visible(path)} is not a plan of lit-lora; name another output folder") from error
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{visible(path)} is not a plan of lit-lora; name another output folder")
    return found


def _remove(out: Path, names: Sequence[str]) -> None:
    for name in names:
        if name.endswith(".tar"):
            (out / name).unlink(missing_ok=True)
            (out / f"{name}.index").unlink(missing_ok=True)


def _digest(values: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
