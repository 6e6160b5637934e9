"""Ranks of layers from their singular values: a rank, a share of the energy, or a number of bytes for all layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lit_lora.byte_sizes import format_bytes
from lit_lora.errors import UserError, check_least, check_most

_ROUNDING = 1e-12
"""Share of the energy that is less than the error of its sum."""


@dataclass(frozen=True)
class Spectrum:
    """The energies of a layer's components; the energy of an update is the square of its Frobenius norm.

    Args:
        energies: Squares of the singular values in falling order, float64; of a grouped convolution their sums over the groups.
        total: Energy of the layer's update, which may have more components than are listed.
        groups: PEFT's ``r`` is the number of components times this.
        bytes_per_step: Size of one component's tensors in the file.
    """

    energies: Tensor
    total: float
    groups: int
    bytes_per_step: int

    @property
    def largest(self) -> int:
        """Number of components that are listed."""
        return len(self.energies)

    def kept(self, components: int) -> float:
        """Share of the energy that the first components have; 1 for a layer without any."""
        return min(1.0, float(self.energies[:components].sum()) / self.total) if self.total > 0 else 1.0


Spectra = Mapping[str, Spectrum]
"""Spectra by layer."""
Components = dict[str, int]
"""Number of components by layer, at least 1."""


@dataclass(frozen=True)
class Budget:
    """How far layers are reduced; one of the three is set.

    Args:
        rank: Maximum rank of each layer.
        energy: Share of each layer's energy to keep at least, above 0 and at most 1. A layer gets the lowest rank that does.
        size: Maximum size of the adapter's file in bytes. Components are taken over all layers by their energy per byte.

    Raises:
        UserError: If not exactly one is set, or it is outside its range.
    """

    rank: int | None = None
    energy: float | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        given = [f"{name}={value}" for name, value in vars(self).items() if value is not None]
        if len(given) != 1:
            raise UserError(
                f"give one of rank, energy and size, such as --rank 8, --energy 0.95 or --size 20MB; "
                f"{' and '.join(given) + ' were' if given else 'none of them was'} given"
            )
        check_least(1, rank=self.rank, size=self.size)
        check_most(1, energy=self.energy)
        if self.energy is not None and not self.energy > 0:
            raise UserError(f"energy={self.energy} is too small; it must be above 0 and at most 1, such as 0.95")

    def components(self, spectra: Spectra, measure: Callable[[Components], int]) -> Components:
        """The number of components of each layer.

        Args:
            spectra: Spectra of all layers.
            measure: Function that returns the size of the file with these numbers of components, for a budget of bytes.

        Raises:
            UserError: If one component of each layer exceeds a budget of bytes, or a grouped convolution has more groups than
                the rank.
        """
        if self.size is not None:
            return _within_bytes(spectra, self.size, measure)
        if self.energy is not None:
            return {layer: _enough(one, self.energy) for layer, one in spectra.items()}
        assert self.rank is not None
        for layer, one in spectra.items():
            if one.groups > self.rank:
                raise UserError(
                    f"rank={self.rank} is too small for {layer}, a convolution of {one.groups} groups: it must be at least "
                    f"{one.groups}"
                )
        return {layer: min(one.largest, self.rank // one.groups) for layer, one in spectra.items()}


def _enough(spectrum: Spectrum, share: float) -> int:
    """The lowest number of components with a share of the energy."""
    reached = spectrum.energies.cumsum(0) >= share * spectrum.total * (1 - _ROUNDING)
    return min(spectrum.largest, int((~reached).sum()) + 1)


def _within_bytes(spectra: Spectra, most: int, measure: Callable[[Components], int]) -> Components:
    """The components with the most energy per byte that fit into a file, at least one for each layer."""
    smallest = measure(dict.fromkeys(spectra, 1))
    if smallest > most:
        raise UserError(
            f"size={format_bytes(most)} ({most:,} bytes) is too small: with the lowest rank in each of its {len(spectra)} layers "
            f"the file has {smallest:,} bytes"
        )
    steps = sum(one.bytes_per_step for one in spectra.values())
    available = most - (smallest - steps)
    while True:
        # Names and numbers in the file's header, too, depend on the ranks.
        components = _most_energy(spectra, available)
        excess = measure(components) - most
        if excess <= 0:
            return components
        available -= excess


def _most_energy(spectra: Spectra, available: int) -> Components:
    """The components with the most energy per byte whose tensors have at most so many bytes, at least one for each layer."""
    components = dict.fromkeys(spectra, 1)
    available -= sum(one.bytes_per_step for one in spectra.values())
    further = sorted(
        (-energy / one.bytes_per_step, layer)
        for layer, one in spectra.items()
        for energy in one.energies[1:].tolist()
        if energy > _ROUNDING * one.total
    )
    full: set[str] = set()
    for _, layer in further:  # a layer's components come in their order, because their energies fall
        cost = spectra[layer].bytes_per_step
        if layer in full or cost > available:
            full.add(layer)
            continue
        components[layer] += 1
        available -= cost
    return components
