"""Files that operating systems and programs leave beside the user's own."""

from __future__ import annotations

_NAMES = frozenset(
    {"__macosx", ".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", ".appledouble", ".spotlight-v100", ".trashes"}
    | {".fseventsd", ".temporaryitems", "$recycle.bin", "system volume information", "@eadir", ".ipynb_checkpoints"}
)


def is_hidden(name: str) -> bool:
    """Whether a path contains a file or folder that macOS, Windows or a file manager has made, such as ``__MACOSX/._a.jpg``."""
    return any(part.startswith("._") or part.lower() in _NAMES for part in name.split("/"))
