"""Number formats a site can be given. A format is a value, not a class hierarchy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quantvla.runtime.errors import explain, nearest

FP16_BITS = 16
SCALE_BITS = 16  # scales are stored in half precision
Inputs = Literal["int8_block", "uint8_tensor", "float", "int8_static"]


@dataclass(frozen=True)
class Scheme:
    """How the weight and the input of one linear are represented.

    Weights: signed ``weight_bits``-bit integers, symmetric, one half-precision scale per ``block``
    consecutive input channels of an output row. ``inputs`` says what they are multiplied with:

    - ``int8_block``: signed 8-bit integers, symmetric, one scale per token and block;
    - ``uint8_tensor``: unsigned 8-bit integers with a zero point, one scale for all tokens, so that
      a whole row of the weight has one scale (``block`` is the input dimension);
    - ``float``: the input as it is; only the weight is quantized;
    - ``int8_static``: signed 8-bit integers with one scale per input channel, fixed at calibration.
      A scale that varies along the sum cannot leave an integer dot product, so that this format is
      simulated in float and has no kernel anywhere.

    All other scales of inputs are computed at run time. ``block == 0`` and ``weight_bits == 16`` is the float
    format.
    """

    name: str
    weight_bits: int
    activation_bits: int
    block: int = 0
    inputs: Inputs = "int8_block"

    @property
    def is_float(self) -> bool:
        """True when nothing is quantized."""
        return self.weight_bits >= FP16_BITS

    def weight_bytes(self, out_features: int, in_features: int) -> int:
        """Return the bytes of a weight matrix in this format, block scales included.

        Float weights are counted in half precision, the reference of "memory saved".
        """
        if self.is_float:
            return out_features * in_features * FP16_BITS // 8
        codes = out_features * in_features * self.weight_bits // 8
        return codes + out_features * (in_features // self.block) * SCALE_BITS // 8


FLOAT = Scheme("float", FP16_BITS, FP16_BITS, inputs="float")
DROPPED = Scheme("dropped", 0, 0)

_INTEGER: dict[str, tuple[int, int, Inputs]] = {
    "w4a8": (4, 8, "int8_block"),
    "w8a8": (8, 8, "int8_block"),
    "w8a8-dynamic": (8, 8, "uint8_tensor"),
    "w4a16": (4, FP16_BITS, "float"),
    "w8a16": (8, FP16_BITS, "float"),
}
INTEGER_SCHEMES = tuple(_INTEGER)
_SIMULATED: dict[str, tuple[int, int, Inputs]] = {"w4a8-static": (4, 8, "int8_static")}


def scheme_name(weight_bits: int, inputs: Inputs) -> str:
    """Return the name of the scheme with these weights and inputs."""
    return next(
        n for n, (bits, _, kind) in _INTEGER.items() if (bits, kind) == (weight_bits, inputs)
    )


def format_of(weight_bits: int, inputs: Inputs, block: int) -> str:
    """Return how a number format is written: ``w4a8:32``; without a block where a row has one scale."""
    name = scheme_name(weight_bits, inputs)
    return name if inputs == "uint8_tensor" else f"{name}:{block}"


def resolve_scheme(name: str, blocks: tuple[int, ...], *, site: str, in_features: int) -> Scheme:
    """Return the scheme called ``name`` with the first of ``blocks`` that divides ``in_features``.

    ``w8a8-dynamic`` has one scale a row whatever ``blocks`` says. Raises `QuantVLAError` for an unknown scheme, or naming the site when no block fits.
    """
    if name == FLOAT.name:
        return FLOAT
    known = _INTEGER | _SIMULATED
    if name not in known:
        raise explain(f"scheme {name!r}", "unknown", remedy=nearest(name, [FLOAT.name, *known]))
    weight_bits, activation_bits, inputs = known[name]
    if inputs == "uint8_tensor":
        blocks = (in_features,)
    for block in blocks:
        if in_features % block == 0:
            return Scheme(name, weight_bits, activation_bits, block, inputs)
    raise explain(
        site,
        f"its input dimension is not a multiple of the block {' or '.join(map(str, blocks))}",
        got=in_features,
        remedy="add a smaller block to the rule (16, 32, 64, 128 and 256 have kernels) or a rule "
        "that leaves this site float",
    )
