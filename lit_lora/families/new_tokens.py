"""New tokens of a CLIP text encoder, whose embeddings are trained (textual inversion)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_lora.distributed.collectives import full_tensor
from lit_lora.errors import UserError

_PLACEHOLDER = re.compile(r"<?[a-z0-9][a-z0-9_.-]*>?")

TokenStart = str | int | Mapping[str, Tensor]
"""First values of a new token's embeddings: those of words, random ones of this number, or tensors by text encoder."""


class NewTokenEmbedding(nn.Module):
    """A token embedding whose table is frozen, with further rows that are trained (Gal et al., 2022, arXiv 2208.01618).

    Args:
        base: The encoder's embedding, ``(V, D)``; it is frozen and its table does not change.
        first: Id of the first new token; the tokens that the tokenizer knew have smaller ids.
        rows: First values of the new rows, ``(N, D)``; the trained rows are float32.
    """

    def __init__(self, base: nn.Embedding, first: int, rows: Tensor) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.first = first
        self.new_tokens = nn.Parameter(rows.detach().float().clone())

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids, ``(…)``, in the table's dtype, ``(…, D)``."""
        is_new = ids >= self.first
        known: Tensor = self.base(ids.masked_fill(is_new, 0))
        new = F.embedding((ids - self.first).clamp(min=0), self.new_tokens)
        return torch.where(is_new.unsqueeze(-1), new.to(known.dtype), known)


def check_placeholders(placeholders: Iterable[str]) -> None:
    """Check that placeholders can be tokens of CLIP and names of files.

    Args:
        placeholders: New tokens, such as ``<cat-toy>``.

    Raises:
        UserError: If one holds other characters, or two would have the same file.
    """
    files: dict[str, str] = {}
    for placeholder in placeholders:
        if not _PLACEHOLDER.fullmatch(placeholder):
            raise UserError(
                f"new token {placeholder!r} should be of lowercase letters, digits and - _ . between < and >, such as <cat-toy>: "
                f"CLIP makes captions lowercase, and its embedding is saved under this name"
            )
        other = files.setdefault(file_stem(placeholder), placeholder)
        if other != placeholder:
            raise UserError(f"new tokens {other!r} and {placeholder!r} would have the same file; rename one")


def file_stem(placeholder: str) -> str:
    """Name of a new token's file without its ending."""
    return placeholder.strip("<>")


def add_tokens(tokenizer: Any, encoder: Any, starts: Mapping[str, str | int | Tensor]) -> dict[str, int]:
    """Give a tokenizer and its text encoder new tokens.

    A placeholder of several vectors is the tokens ``<cat>``, ``<cat>_1``, ``<cat>_2``, …, as in diffusers.

    Args:
        tokenizer: Tokenizer, changed in place.
        encoder: Text encoder, whose token embedding is replaced by a :class:`NewTokenEmbedding`.
        starts: First values of each placeholder's embeddings: words, a number of random vectors, or a tensor ``(n, D)``.

    Returns:
        Number of vectors of each placeholder.

    Raises:
        UserError: If a placeholder is a token already, words have no token, or the vectors of two placeholders would be mixed up.
    """
    table: nn.Embedding = encoder.get_input_embeddings()
    first, rows, counts = len(tokenizer), [], {}
    for placeholder, start in starts.items():
        values = _first_values(placeholder, start, tokenizer, table)
        names = [placeholder, *(f"{placeholder}_{i}" for i in range(1, len(values)))]
        if known := [name for name in names if name in tokenizer.get_vocab()]:
            raise UserError(
                f"new token {known[0]!r} is a token of the base already; choose another name, such as <my-{known[0]}>"
            )
        rows.append(values)
        counts[placeholder] = len(values)
    _check_apart(counts, set(tokenizer.added_tokens_encoder))
    for placeholder, count in counts.items():
        tokenizer.add_tokens([placeholder, *(f"{placeholder}_{i}" for i in range(1, count))])
    encoder.set_input_embeddings(NewTokenEmbedding(table, first, torch.cat(rows)))
    return counts


def _check_apart(counts: Mapping[str, int], known: Collection[str]) -> None:
    """Check that a caption's placeholders become their own tokens and no others, as diffusers' pipelines replace them.

    ``maybe_convert_prompt`` puts ``style style_1 style_2 …`` for every ``style``, as long as there is such a token, and also
    where ``style`` is a part of another placeholder.

    Args:
        counts: Number of vectors of each placeholder.
        known: Tokens that were added to the tokenizer before.
    """
    tokens = {*known, *counts}
    for name, count in counts.items():
        following = f"{name}_{count}"  # the first that is none of its vectors
        longer = (
            following if following in tokens else next((one for one in counts if one != name and name in one), None)
        )
        if longer is not None and (count > 1 or longer == following):
            raise UserError(
                f"new token {name!r} becomes {name} {name}_1 … where it has several vectors, which cannot be told apart from the "
                f"token {longer!r}; rename one, such as <my-{name.strip('<>')}>"
            )


def new_rows(encoder: Any, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """The full embeddings of each placeholder on the CPU, ``(n, D)``.

    A collective call where the strategy shards weights.

    Args:
        encoder: Text encoder with the new tokens.
        counts: Number of vectors of each placeholder, in the order in which they were added.
    """
    rows = full_tensor(encoder.get_input_embeddings().new_tokens).detach().cpu()
    return {name: part.clone() for name, part in zip(counts, rows.split(list(counts.values())), strict=True)}


def _first_values(placeholder: str, start: str | int | Tensor, tokenizer: Any, table: nn.Embedding) -> Tensor:
    if isinstance(start, Tensor):
        if start.ndim != 2 or start.shape[1] != table.embedding_dim:
            raise UserError(
                f"the embeddings of {placeholder} have the shape {tuple(start.shape)}, and the text encoder takes (n, "
                f"{table.embedding_dim}); use the base that they were trained on"
            )
        return start
    if isinstance(start, int):
        return torch.randn(start, table.embedding_dim) * table.weight.float().std()
    ids = tokenizer(start, add_special_tokens=False).input_ids
    if not ids:
        raise UserError(
            f"new_tokens: {start!r}, the words that {placeholder} begins with, hold no token; give a word or a number"
        )
    return table.weight[torch.tensor(ids)].detach()
