"""Prior preservation: images of the class beside those of the subject."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_lora.argument_types import check_types
from lit_lora.errors import UserError, check_above
from lit_lora.to_device import to_device

_LOOKED_AT = 1000
"""Number of samples after which both kinds of images should have been seen."""
_FEW = 20
"""Number of samples that may be of one kind by chance."""


class PriorPreservation:
    r"""The prior preservation loss of DreamBooth (Ruiz et al., 2023, arXiv 2208.12242, equation 2).

    The loss is that of the subject's images plus :math:`\lambda` times that of images of its class, such as those that the base
    draws for "a photo of a dog", so that the class is not forgotten. Each class image's loss is multiplied by :math:`\lambda`
    before the mean over the batch, which is the equation, up to a constant factor, if as many images of the class as of the
    subject are drawn. A warning tells if the first thousand samples, or those of the first
    epoch, are all of one kind.

    Args:
        class_keys: Glob pattern of the keys of class images. A packed folder's keys begin with the subfolder: ``class/*``.
            Defaults to null: the batch marks them in ``prior``, as it does for a ``ShardSet`` with ``prior: true``.
        weight: Weight :math:`\lambda` of their loss, above 0; defaults to 1.

    Raises:
        UserError: If ``class_keys`` is empty, or ``weight`` is not above 0.
    """

    def __init__(self, class_keys: str | None = None, weight: float = 1.0) -> None:
        check_types(PriorPreservation, locals())
        check_above(0, weight=weight)
        if class_keys == "":
            raise UserError("class_keys is empty; give a glob pattern of the keys of class images, such as class/*")
        self.class_keys = class_keys
        self.weight = weight
        self._seen = {True: 0, False: 0}
        """Number of class images and of others so far, until the warning was due."""
        self._key = ""
        self._looked = False

    def weights(self, batch: Mapping[str, Any], device: torch.device) -> Tensor:
        """Weight of each sample: :attr:`weight` for class images, 1 for others; float32 ``(B,)``.

        Args:
            batch: Batch with ``key``, the names of its samples; and with ``prior``, a bool for each, without ``class_keys``.
            device: Device of the result.

        Raises:
            UserError: If the batch has no keys, or without ``class_keys`` no ``prior``.
        """
        if "key" not in batch:
            raise UserError(
                "prior preservation tells class images by their keys, and the batch has no 'key'; add a list of the samples' "
                "names"
            )
        of_class = self._of_class(batch)
        self._count(of_class, batch["key"])
        return to_device(torch.tensor([self.weight if one else 1.0 for one in of_class]), device)

    def _of_class(self, batch: Mapping[str, Any]) -> list[bool]:
        if self.class_keys is not None:
            return [fnmatchcase(key, self.class_keys) for key in batch["key"]]
        if "prior" not in batch:
            raise UserError(
                "prior preservation has no class_keys, and the batch does not tell class images under 'prior'; give class_keys, "
                "or name the class images as a set of train_sets with prior: true"
            )
        return list(batch["prior"])

    def warn_of_one_kind(self, least: int = _FEW) -> None:
        """Warn once if all samples so far were of one kind.

        Args:
            least: Number of samples that may have been of one kind by chance; defaults to 20.
        """
        if self._looked or (seen := sum(self._seen.values())) < least:
            return
        self._looked = True
        if not all(self._seen.values()):
            which = "all" if self._seen[True] else "none"
            rank_zero_warn(
                f"prior preservation has taken {which} of the first {seen:,} samples for class images: keys such as "
                f"{self._key!r} against class_keys={self.class_keys!r}; set class_keys to a pattern of their keys alone, or null "
                "if a set of train_sets has prior: true"
            )

    def _count(self, of_class: list[bool], keys: list[str]) -> None:
        if self._looked:
            return
        for one in of_class:
            self._seen[one] += 1
        self._key = keys[0]
        self.warn_of_one_kind(_LOOKED_AT)
