"""Collecting garbage seldom, in processes of tests."""

from __future__ import annotations

import gc


def collect_seldom() -> None:
    """Leave what the libraries hold out of collections, each of which would take a second, and collect less often.

    By default Python looks for garbage after every 700 new objects: a twentieth of the time of tests that train tiny models.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
