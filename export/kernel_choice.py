"""Which operator each integer linear is exported as: by what a machine was measured to be fastest with."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from quantvla.export.kernels import (
    DYNAMIC_MATMUL,
    INTEGER_LINEAR,
    KERNELS,
    MATMUL_NBITS,
    operator_block,
    site_name,
)
from quantvla.export.panels import shape_fits
from quantvla.export.rewrites.graph import shape_of
from quantvla.export.stages import StageGraph
from quantvla.latency_table import Kernel, LatencyTable
from quantvla.quantizer import QuantizedWeight
from quantvla.runtime.manifest import KernelChoices, SiteKernel
from quantvla.schemes import Inputs, format_of

Wanted = Literal["auto", "own", "onnxruntime"]
"""``auto``: the fastest as measured, the default where nothing was; ``own``: the project's wherever they fit;
``onnxruntime``: its operators only, no graph of own ones."""
MARGIN = 0.05
"""By how much another operator must be faster than the default: medians scatter by that, and own
operators take the activation and the addition that follow them in, which a profile does not time."""

_Linear = tuple[int, int, int, bool, str]


def exact_operators(
    bits: int, inputs: Inputs, block: int, out_features: int, *, own: bool = True
) -> tuple[str, ...]:
    """Return the operators that compute a number format as `quantvla.quantizer.integer_linear` does, the default first.

    ``MatMulNBits`` with another block than the scheme's rounds activations per smaller block; it is
    among them only where no other is. Without ``own`` the project's are left out.
    """
    if inputs == "uint8_tensor":
        return (DYNAMIC_MATMUL.operator,)
    fits = inputs == "int8_block" and shape_fits(out_features, operator_block(block))
    found = [INTEGER_LINEAR.operator] if own and fits else []
    if not found or operator_block(block) == block:
        found.append(MATMUL_NBITS.operator)
    return tuple(found)


@dataclass(frozen=True)
class Profile:
    """Measured durations, found by the number of rows of an input rather than by its axes."""

    machine: str
    median_us: Mapping[_Linear, Mapping[str, float]]

    @classmethod
    def of(cls, table: LatencyTable) -> Profile:
        """Return a table's durations."""
        times = {_key(kernel): time for kernel, time in table.operators().items()}
        return cls(table.machine.describe(), times)


def _key(kernel: Kernel) -> _Linear:
    *rows, columns = kernel.shape
    return math.prod(rows), columns, kernel.out_features, kernel.bias, kernel.format


def choose_kernels(
    graphs: Sequence[StageGraph],
    weights: Mapping[str, QuantizedWeight],
    wanted: Wanted,
    table: LatencyTable | None,
) -> KernelChoices:
    """Return the operator of every integer linear in ``graphs``, as they are before weights become panels.

    ``weights``: by site. ``table``: durations measured on this machine, None or empty if there are none.
    """
    profile = Profile.of(table) if table is not None and table.times else None
    sites = {}
    for graph in graphs:
        for node in graph.model.graph:
            if node.op_type in KERNELS and (site := site_name(node)) not in sites:
                kernel = _kernel(node, weights[site])
                sites[site] = _chosen(site, graph.name, kernel, weights[site], wanted, profile)
    return KernelChoices(
        profile=profile.machine if profile is not None and wanted == "auto" else "",
        sites=tuple(sites.values()),
    )


def stock_sites(choices: KernelChoices) -> Collection[str]:
    """Return the sites that keep ONNX Runtime's operator in the graph of own ones."""
    return {site.site for site in choices.sites if site.operator != INTEGER_LINEAR.operator}


def _kernel(node: ir.Node, weight: QuantizedWeight) -> Kernel:
    at = KERNELS[node.op_type].bias
    bias = len(node.inputs) > at and node.inputs[at] is not None
    shape = shape_of(node.inputs[0])
    assert shape is not None
    form = format_of(weight.bits, weight.inputs, weight.block)
    return Kernel(shape, weight.codes.shape[0], bias, form)


def _chosen(
    site: str, stage: str, kernel: Kernel, weight: QuantizedWeight, wanted: Wanted, profile: Profile | None
) -> SiteKernel:  # fmt: skip
    operators = exact_operators(
        weight.bits, weight.inputs, weight.block, kernel.out_features, own=wanted != "onnxruntime"
    )
    measured = profile.median_us.get(_key(kernel), {}) if profile and wanted == "auto" else {}
    known = {name: measured[name] for name in operators if name in measured}
    operator, reason = operators[0], ""
    if wanted != "auto":
        reason = f"asked for: {wanted}"
    elif len(operators) == 1:
        reason = "the only kernel of its format"
    elif profile is None:
        reason = "no profile of this machine: default"
    elif len(known) < len(operators):
        reason = "not in the profile of this machine: default"
    else:
        operator, reason = _fastest(operators, known)
    return SiteKernel(
        site=site, stage=stage, format=kernel.format, shape=kernel.shape,
        out_features=kernel.out_features, operator=operator, reason=reason, median_us=known,
    )  # fmt: skip


def _fastest(operators: Sequence[str], known: Mapping[str, float]) -> tuple[str, str]:
    default, fastest = operators[0], min(operators, key=lambda name: known[name])
    if fastest == default:
        return default, "measured to be the fastest"
    if known[fastest] > (1 - MARGIN) * known[default]:
        return default, f"default: {fastest} is less than {MARGIN:.0%} faster"
    return fastest, "measured to be the fastest"
