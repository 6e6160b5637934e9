"""Warnings that a user can do nothing about."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_HARMLESS = (
    r"LightningCLI's args parameter",  # we are the command line
    r"The dirpath has changed",  # each run has its own log folder
    r"Found \d+ module\(s\) in eval mode",  # the frozen encoders
    r".*isinstance.treespec, LeafSpec",  # Lightning's own use of torch
    r"`loftq_config` specified but will be ignored",  # a default that jsonargparse spells out
    r"Total length of `list` across ranks is zero",  # no validation data is a choice
    r"Couldn't infer the batch indices fetched from your dataloader",  # batches tell their slots and keys
    r"The .*dataloader.* does not have many workers",  # num_workers has a default and a reason
    r"Checkpoint directory .* exists and is not empty",  # of a run that is resumed
    r"The AccumulateGrad node's stream does not match",  # Lightning makes DDP's nodes on a stream of its own
    r"The number of training batches .* is smaller than the logging interval",  # steps are logged across passes
)
"""Warnings of Lightning, torch and PEFT that need no action from the user."""


@contextmanager
def harmless_ignored() -> Iterator[None]:
    """A context in which these warnings are not shown."""
    with warnings.catch_warnings():
        for harmless in _HARMLESS:
            warnings.filterwarnings("ignore", harmless)
        yield
