"""What an adapter's files say about a quantized base that they are made for."""

from __future__ import annotations

from collections.abc import Mapping

from lit_lora.quantization import Dense, Quantization

_KEY = "lit_lora.quantized_base"


def quantized_metadata(quantization: Quantization | None) -> dict[str, str]:
    """The entry of an adapter's metadata that contains, beside what was learned, a part of ``W - Q(W)``.

    Args:
        quantization: Quantization ``Q`` of the base; None for a base in full precision gives no entry.
    """
    return {} if quantization is None else {_KEY: quantization_name(quantization)}


def quantized_base(metadata: Mapping[str, str]) -> str | None:
    """The quantization that an adapter's metadata name; None for an adapter of the base in full precision."""
    return metadata.get(_KEY)


def quantization_name(quantization: Quantization | None) -> str:
    """A quantization with its options, as files name it; None is a base in full precision."""
    quantization = quantization or Dense()
    options = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(quantization).items()))
    return f"{type(quantization).__name__}({options})"


def twice(path: object, quantization: str) -> str:
    """Why an adapter does not belong on a base in full precision, and what to do, for errors and warnings."""
    return (
        f"the adapter {path} was made for the base quantized by {quantization}: its first values, which make up for the "
        f"quantization, would come twice on the base in full precision; export it with files_for: original of "
        f"LoftqInitialization"
    )
