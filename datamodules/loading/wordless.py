"""Captions without words, of which training says nothing by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

_LOOKED_AT = 100
"""Number of captions without words that are no chance, as that of caption dropout is."""


class WordlessCaptions:
    """Warns once if none of the first captions of a run has words, as when they are read from the wrong member or key."""

    def __init__(self) -> None:
        self._seen = 0
        self._looked = False

    def count(self, batch: Mapping[str, Any]) -> None:
        """Count the captions of a batch; batches without captions are passed over.

        Args:
            batch: Batch with ``caption``, a list of texts.
        """
        captions = batch.get("caption", ())
        if self._looked or not captions:
            return
        self._seen += len(captions)
        if any(str(caption).strip() for caption in captions):
            self._looked = True
        elif self._seen >= _LOOKED_AT:
            self._looked = True
            rank_zero_warn(
                f"none of the first {self._seen:,} captions has words, so that the model learns nothing of them; if that is not "
                f"meant, look at the samples with lit-lora shards check, and at data.init_args.decoder.captions"
            )
