"""Files through which the staging process and the training processes communicate."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from lit_lora.datamodules.remote.transfer import is_remote
from lit_lora.files import part_path
from lit_lora.machine import host
from lit_lora.redact import redact

SHARD_NAME = re.compile(r"[0-9a-f]{16}-.+")
STATE_NAME = re.compile(r"state-[0-9a-f]{16}")
PASSED_NAME = re.compile(r"passed-[\w.-]+-\d+(\.[0-9a-f]{8}-\d+-[0-9a-f]{8})?")
JOB_GLOB = "lit_lora-job-*.json"
_JOB_FORMAT = "lit_lora.stager_job"


def local_name(location: str) -> str:
    """File name of a shard's local copy; it contains no credentials."""
    plain = redact(location) if is_remote(location) else os.path.abspath(location.removeprefix("file://"))
    base = re.sub(r"[^\w.-]", "_", plain.rpartition("/")[2], flags=re.ASCII)[-100:]
    return f"{hashlib.sha256(plain.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}-{base}"


def state_path(shard: Path) -> Path:
    """File beside a local copy with what the storage stated of the shard that was copied."""
    return shard.with_name(f"state-{shard.name[:16]}")


def slot_path(folder: Path, number: int) -> Path:
    """Folder for the shards of one job."""
    return folder / f"lit_lora-slot-{number}"


def passed_path(slot: Path, job: str, local_rank: int) -> Path:
    """File in which a process writes the number of the last visit that it has read."""
    return slot / f"passed-{job}-{local_rank}"


def job_path(folder: Path, job: str) -> Path:
    """File with the state of a staging process; one per machine, in case machines share the folder."""
    return folder / f"lit_lora-job-{job}-{host()}.json"


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically, without sync, since it need not survive a crash of the machine."""
    part = part_path(path)
    try:
        part.write_text(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_job(path: Path, **values: Any) -> None:
    """Write the file of a job."""
    write_text(path, json.dumps({"format": _JOB_FORMAT, "host": host(), **values}) + "\n")


def read_job(path: Path) -> dict[str, Any] | None:
    """Content of the file of a job; None if it does not exist or is not such a file."""
    try:
        job = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return job if isinstance(job, dict) and job.get("format") == _JOB_FORMAT else None
