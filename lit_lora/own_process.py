"""What a command needs of its process: open standard streams, docstrings, a working folder."""

from __future__ import annotations

import os
import sys

from lit_lora.errors import UserError


def open_standard_streams() -> None:
    """Open those of the three standard streams that are closed, on the null device.

    Otherwise files take their numbers, and what libraries print goes into the files.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is not None:
            continue
        null = os.open(os.devnull, os.O_RDWR)
        if null != number and _is_closed(number):
            os.dup2(null, number)
            os.close(null)
            null = number
        os.set_inheritable(null, True)  # or a child's files would take the number
        stream = open(null, mode, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115 open until the end
        setattr(sys, name, stream)


def _is_closed(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return True
    return False


def check_process() -> None:
    """Check what libraries need to be imported.

    Raises:
        UserError: If Python runs without docstrings, or the working folder is gone.
    """
    if sys.flags.optimize > 1:
        raise UserError(
            "Python runs without docstrings, which transformers reads; leave out -OO, and unset PYTHONOPTIMIZE or set it to 1"
        )
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the working folder was removed; go to another folder") from error
