"""The one exception that stands for a mistake the user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """A wrong value, file or combination that the user can put right.

    The message gives the value, the bound and the next action. The command line prints it alone, without a traceback,
    and exits with status 2.
    """
