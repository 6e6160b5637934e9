"""Layers of LoHa and LoKr, whose updates are products of matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_lora.formats import AdapterFiles
from lit_lora.formats.hadamard_kronecker import alphas_of, check_shapes, groups_of, ranks_of


@dataclass(frozen=True)
class ProductLayer:
    """One layer of LoHa or LoKr.

    Args:
        tensors: Its tensors by LyCORIS' names, such as ``hada_w1_a``.
        rank: Rank in PEFT's config.
        alpha: PEFT's alpha.
    """

    tensors: Mapping[str, Tensor]
    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """Factor of the update."""
        return self.alpha / self.rank

    def norm(self) -> float:
        """Frobenius norm of the scaled update: of the elementwise product in LoHa, and of the Kronecker product in LoKr."""
        if "hada_w1_a" in self.tensors:
            update = self._hadamard("1") * self._hadamard("2")
            return abs(self.scale) * float(update.norm())
        first, second = (self._kronecker(name) for name in ("lokr_w1", "lokr_w2"))
        return abs(self.scale) * float(first.norm() * second.norm())  # the norm of a Kronecker product

    def _hadamard(self, number: str) -> Tensor:
        """One of the two factors, ``(out, in)`` or ``(out, in, h, w)``."""
        left, right = (self.tensors[f"hada_w{number}_{side}"].float() for side in "ab")
        core = self.tensors.get(f"hada_t{number}")
        return left @ right if core is None else torch.einsum("ijkl,jr,ip->prkl", core.float(), right, left)

    def _kronecker(self, name: str) -> Tensor:
        """One of the two factors, full or as a product of its own."""
        if name in self.tensors:
            return self.tensors[name].float()
        left, right = (self.tensors[f"{name}_{side}"].float() for side in "ab")
        core = self.tensors.get("lokr_t2") if name == "lokr_w2" else None
        return left @ right if core is None else torch.einsum("ijkl,ip,jr->prkl", core.float(), left, right)


def product_layers(contents: AdapterFiles) -> Iterator[tuple[str, ProductLayer]]:
    """The layers of LoHa or LoKr with their names.

    Args:
        contents: A part of an adapter.

    Raises:
        UserError: If the tensors of a layer do not fit together.
    """
    alphas, ranks = alphas_of(contents), ranks_of(contents)
    for name, group in groups_of(contents).items():
        check_shapes(name, group, "the adapter")
        yield name, ProductLayer(group, ranks[name], alphas[name])
