"""Rounding that lets later input channels make up for the errors of earlier ones (GPTQ, arXiv 2210.17323).

Errors are measured with the second moments of the input, E|x (W - Ŵ)|². All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantvla.quantizer import QuantizedWeight, block_scales, round_codes
from quantvla.schemes import Scheme


@dataclass(frozen=True)
class SecondOrder:
    """How weights are rounded.

    ``damp``: share of the mean second moment added to every channel; ``dynamic``: choose a block's
    scales when it is its turn, on the weights as earlier blocks changed them, instead of before;
    ``polish``: rounds of scale refits and coordinate descent over the codes afterwards.
    """

    damp: float = 0.01
    dynamic: bool = False
    polish: int = 0


def damped(moments: Tensor, damp: float) -> Tensor:
    """Return a copy of ``moments`` (in, in) with ``damp`` times their mean diagonal added to it."""
    found = moments.clone()
    found.diagonal().add_(_share(moments, damp))
    return found


def _share(moments: Tensor, damp: float) -> Tensor:
    return moments.diagonal().mean().clamp_min(1e-12) * damp


def corrected_target(weight: Tensor, student: Tensor, cross: Tensor, damp: float) -> Tensor:
    """Return the float weight (out, in) whose output on the student's inputs is closest to W on the teacher's.

    With x the student's input and t the teacher's, E|W t - V x|² is least at V = W E[t x^T] E[x x^T]^-1,
    and grows around it as E|(V - Ŵ) x|², so that rounding V instead of W takes the drift of earlier
    layers into account (the idea of GPTAQ, arXiv 2504.02692, and Qronos, arXiv 2505.11695).
    ``damp`` pulls V towards W where inputs hardly vary.
    """
    weight = weight.double()
    wanted = weight @ cross + _share(student, damp) * weight
    corrected: Tensor = torch.linalg.solve(damped(student, damp), wanted, left=False)
    return corrected


def round_second_order(
    weight: Tensor, moments: Tensor, scheme: Scheme, options: SecondOrder
) -> QuantizedWeight:
    """Round ``weight`` (out, in) under input moments (in, in), E[x x^T] up to a factor."""
    target, moments = weight.double(), damped(moments.double(), options.damp)
    codes, scales = _greedy(target, moments, scheme, options)
    for _ in range(options.polish):
        scales = _refitted(target, codes, scales, moments, scheme)
        codes = _descended(target, codes, scales, moments, scheme)
    return QuantizedWeight(
        codes.to(torch.int8), scales.half(), scheme.weight_bits, scheme.block, scheme.inputs
    )


def relative_error(weight: Tensor, quantized: QuantizedWeight, moments: Tensor) -> float:
    """Return sqrt(E|x (W - Ŵ)|² / E|x W|²) under input moments (in, in)."""
    reference = weight.double()
    difference = quantized.dequantize().double() - reference
    lost = ((difference @ moments) * difference).sum().clamp_min(0)
    return float((lost / ((reference @ moments) * reference).sum().clamp_min(1e-30)).sqrt())


def _greedy(
    target: Tensor, moments: Tensor, scheme: Scheme, options: SecondOrder
) -> tuple[Tensor, Tensor]:
    """Round column by column; the error of each is spread over those still to come."""
    rows, columns = target.shape
    block, bits = scheme.block, scheme.weight_bits
    left = target.clone()
    spread = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True
    )
    # the error that a rounding error leaves once all later columns have made up for it
    importance = spread.diagonal().reciprocal().square()
    codes = torch.zeros_like(left)
    scales = torch.zeros(rows, columns // block, dtype=left.dtype)
    if not options.dynamic:
        scales = block_scales(target, bits, block, moments.diagonal()).double()
    for start in range(0, columns, block):
        stop, number = start + block, start // block
        part, local = left[:, start:stop].clone(), spread[start:stop, start:stop]
        if options.dynamic:
            chosen = block_scales(part, bits, block, importance[start:stop])
            scales[:, number] = chosen[:, 0].double()
        scale = scales[:, number]
        errors = torch.zeros_like(part)
        for k in range(block):
            codes[:, start + k] = round_codes(part[:, k], scale, bits)
            error = (part[:, k] - codes[:, start + k] * scale) / local[k, k]
            part[:, k:] -= error[:, None] * local[k, k:]
            errors[:, k] = error
        left[:, stop:] -= errors @ spread[start:stop, stop:]
    return codes, scales


def _refitted(
    target: Tensor, codes: Tensor, scales: Tensor, moments: Tensor, scheme: Scheme
) -> Tensor:
    """Return the scales of least error for these codes, all blocks of a row at once."""
    rows, columns = codes.shape
    blocks = columns // scheme.block
    found = torch.empty_like(scales)
    for row in range(rows):  # a row at a time: (blocks, in) is small, (rows, blocks, in) is not
        basis = torch.zeros(blocks, blocks, scheme.block, dtype=codes.dtype)
        basis[range(blocks), range(blocks)] = codes[row].view(blocks, scheme.block)
        basis = basis.view(blocks, columns)
        projected = basis @ moments
        normal = damped(projected @ basis.t(), 1e-6)
        found[row] = torch.linalg.solve(normal, projected @ target[row])
    found = found.half().double()
    return torch.where(found > 0, found, scales)


def _descended(
    target: Tensor, codes: Tensor, scales: Tensor, moments: Tensor, scheme: Scheme
) -> Tensor:
    """Return the codes after one sweep of coordinate descent: each column's best code given all others."""
    codes, spread = codes.clone(), scales.repeat_interleave(scheme.block, 1)
    gradient = (codes * spread - target) @ moments
    for k in range(codes.shape[1]):
        wanted = codes[:, k] * spread[:, k] - gradient[:, k] / moments[k, k]
        best = round_codes(wanted, spread[:, k], scheme.weight_bits)
        step = (best - codes[:, k]) * spread[:, k]
        gradient += step[:, None] * moments[k]
        codes[:, k] = best
    return codes
