"""Names and keys of the samples to pack."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MAX_KEY_BYTES = 80  # with an extension it fits the 100 bytes of a plain tar header


@dataclass(frozen=True, eq=False)
class SampleNames:
    """The names of N samples in one buffer, since there may be tens of millions.

    A key is the name without its extension and without dots. If several names give the same key, a number is appended to all but
    the first.

    Attributes:
        text: Concatenated names, in UTF-8.
        ends: End of each name in ``text``, int64 (N,).
        numbers: Number that is appended to each key, or 0 for none, int32 (N,).
    """

    text: bytes
    ends: NDArray[np.int64]
    numbers: NDArray[np.int32]

    @classmethod
    def of(cls, names: Iterable[str]) -> SampleNames:
        """Collect names, in the order that determines the numbers of equal keys."""
        text, ends, digests = bytearray(), array("q"), array("Q")
        for name in names:
            text += name.encode("utf-8", "surrogateescape")
            ends.append(len(text))
            digests.append(key_digest(_key(name)))
        unnumbered = cls(bytes(text), np.array(ends, np.int64), np.zeros(len(ends), np.int32))
        return unnumbered._numbered(np.array(digests, np.uint64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, sample: int) -> str:
        start = self.ends[sample - 1] if sample else 0
        return self.text[start : self.ends[sample]].decode("utf-8", "surrogateescape")

    def key(self, sample: int) -> str:
        """The unique key of a sample."""
        number = self.numbers[sample]
        return f"{_key(self[sample])}-{number}" if number else _key(self[sample])

    def select(self, samples: NDArray[np.int64]) -> SampleNames:
        """Only the names and keys of the given samples."""
        names = [self[sample].encode("utf-8", "surrogateescape") for sample in samples.tolist()]
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        return SampleNames(b"".join(names), ends, self.numbers[samples])

    def _numbered(self, digests: NDArray[np.uint64]) -> SampleNames:
        """Number repeated keys. Keys are compared by digests; a collision only adds an unneeded number."""
        known = np.sort(digests)
        repeated = np.unique(known[1:][known[1:] == known[:-1]])
        given: set[int] = set()
        last: dict[int, int] = {}
        for sample in np.flatnonzero(np.isin(digests, repeated)).tolist():
            digest = int(digests[sample])
            if digest not in last:
                last[digest] = 1
                continue
            while True:
                last[digest] += 1
                candidate = key_digest(f"{_key(self[sample])}-{last[digest]}")
                if candidate not in given and not _contains(known, candidate):
                    break
            given.add(candidate)
            self.numbers[sample] = last[digest]
        return self


def _key(name: str) -> str:
    folders, _, base = name.rpartition("/")
    stem = base.rpartition(".")[0] or base
    parts = [part for part in folders.split("/") if part not in ("", ".", "..")]
    key = "/".join([*parts, stem]).replace(".", "_")
    raw = key.encode("utf-8", "surrogateescape")
    if len(raw) <= _MAX_KEY_BYTES:
        return key
    digest = hashlib.sha256(raw).hexdigest()[:16]
    return f"{raw[: _MAX_KEY_BYTES - 24].decode('utf-8', 'ignore')}-{digest}"


def key_digest(key: str) -> int:
    """A 64-bit digest of a key."""
    raw = key.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def _contains(known: NDArray[np.uint64], digest: int) -> bool:
    place = np.searchsorted(known, np.uint64(digest))
    return bool(place < len(known) and known[place] == digest)
