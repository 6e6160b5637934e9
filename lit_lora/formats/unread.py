"""Why files of methods that PEFT does not have, or computes in another way, are not read."""

from __future__ import annotations

import re
from collections.abc import Iterable

_REASONS = {
    r"\.oft_(blocks|diag)$": "OFT or BOFT of LyCORIS and sd-scripts, which rotates a layer's outputs, and PEFT's its inputs",
    r"\.[ab][12]\.weight$": "GLoRA of LyCORIS, which is computed in another way than PEFT's",
    r"\.on_input$": "IA3 of LyCORIS, which adds to a factor of 1, where PEFT's is the factor",
    r"\.(diff|diff_b|w_norm|b_norm)$": "changes of whole weights, norms or biases, which are no adapter of PEFT's",
    r"^bundle_emb\.": "embeddings of new tokens inside a file of LoRA; the tokens have to be files of their own",
    r"\.scalar$": "layers with a trained scalar of LyCORIS, which PEFT does not have",
    r"\.processor\.": "LoRA in attention processors, as diffusers wrote it before version 0.22",
}
"""What is in a file, by patterns of its tensors' names."""


def why_unread(names: Iterable[str]) -> str:
    """What a file holds that no format reads; empty if its tensors' names tell nothing.

    Args:
        names: Names of the file's tensors.
    """
    names = list(names)
    found = [reason for pattern, reason in _REASONS.items() if any(re.search(pattern, name) for name in names)]
    return " and ".join(found)
