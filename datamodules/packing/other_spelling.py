"""Files whose names differ only by capitals or by how Unicode writes their letters."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path, PurePosixPath

from lit_lora.visible import visible


def other_spelling(path: Path) -> str:
    """A hint for the message that a file is missing; empty if there is no file of nearly this name.

    Letters with accents have two forms: macOS's disks and some archives take them apart (NFD), keyboards give them as one (NFC).

    Args:
        path: Path of the missing file.
    """
    name = PurePosixPath(path.name)
    forms = [unicodedata.normalize(form, path.name) for form in ("NFC", "NFD")]
    capitals = [f"{stem}{name.suffix}" for stem in (name.stem.lower(), name.stem.upper(), name.stem.capitalize())]
    for others, reason in ((forms, "is written with another Unicode form"), (capitals, "differs in capitals")):
        for other in others:
            if other != path.name and os.path.lexists(path.with_name(other)):
                return f"; {visible(other)} {reason}: give both the same name"
    return ""
