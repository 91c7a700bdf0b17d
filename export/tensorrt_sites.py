"""Lowering for TensorRT: a marked linear becomes a matrix product in its number format.

Strongly typed networks compute in the types the graph states, so the format is the graph itself:
``fp16``/``bf16`` a plain product; ``int4`` a block-wise DequantizeLinear of the weight, (in, out) along
axis 0; ``int8``/``fp8`` QuantizeLinear and DequantizeLinear at the input, one static scale, and
DequantizeLinear at the weight; ``nvfp4`` TensorRT's own operator at the input, which finds a scale per
block, and two levels of DequantizeLinear at input and weight. TensorRT folds all of them into its
quantized kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from quantvla.activation_scales import FP8_MAX, INT8_MAX, StaticInput
from quantvla.export.eight_bits import fp8_tensor, integer_columns
from quantvla.export.nvfp4 import BLOCK, DYNAMIC_QUANTIZE, weight_blocks
from quantvla.export.site_marks import marks
from quantvla.export.tensorrt_nodes import NodeWriter
from quantvla.quantizer import QuantizedWeight

NVFP4_OPSET, _NVFP4_IR = 23, 11  # the first that have 4-bit floats
_SMOOTHED_RANGE = 16.0  # a smoothed input's largest magnitude: far from the ends of half precision


@dataclass(frozen=True)
class TargetSite:
    """A linear to be lowered: its format, its weight (out, in) and what its format needs.

    ``weight`` is a float tensor, or integers on a grid for int4; ``bias``: (out,);
    ``static``: the input's quantization for int8, fp8 and nvfp4; sites with the same object share one.
    """

    site: str
    format: str
    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    static: StaticInput | None = None


@dataclass(frozen=True)
class PlacedSite:
    """A lowered linear: the name of its product in the graph."""

    site: str
    node: str


def place_sites_(
    model: ir.Model, sites: Mapping[str, TargetSite], activations: str
) -> tuple[tuple[PlacedSite, ...], frozenset[ir.Node]]:
    """Replace every mark; returns the products, and the nodes whose types are final."""
    placed: list[PlacedSite] = []
    final: set[ir.Node] = set()
    shared: dict[tuple[int, int], ir.Value] = {}
    calls: dict[str, int] = {}
    for site, mark in marks(model):
        calls[site] = calls.get(site, 0) + 1
        name = site if calls[site] == 1 else f"{site}#{calls[site]}"
        final |= _SiteWriter(model.graph, mark, name, activations, shared).write(sites[site])
        placed.append(PlacedSite(site, name))
    model.opset_imports.pop("quantvla", None)
    if any(site.format == "nvfp4" for site in sites.values()):
        # what the graph has of the operators of opset 21 means the same there
        model.opset_imports.update({"": NVFP4_OPSET, "trt": 1})
        model.ir_version = max(model.ir_version, _NVFP4_IR)
    return tuple(placed), frozenset(final)


class _SiteWriter(NodeWriter):
    """Writes the nodes of one call of a site in front of its mark, then removes the mark."""

    def __init__(
        self, graph: ir.Graph, mark: ir.Node, name: str, activations: str,
        shared: dict[tuple[int, int], ir.Value],
    ) -> None:  # fmt: skip
        super().__init__(graph, mark, name, activations)
        self._shared = shared

    def write(self, site: TargetSite) -> set[ir.Node]:
        source = self._mark.inputs[0]
        assert source is not None and source.shape is not None
        if site.format in ("int8", "fp8"):
            x, weight = self._static(site, source)
            self._product(site, x, weight)
            return self.nodes
        if site.format == "nvfp4":
            self._product(site, self._nvfp4_input(site, source), self._nvfp4_weight(site))
            return self.nodes
        x = self._half_input(source)
        if site.format == "int4":
            x, weight = self._as_rows(x), self._int4(site)
        else:
            weight = self._constant(
                site.site, "weight", _array(site.weight).T.astype(self._numpy), self._half
            )
        self._product(site, x, weight)
        return self.nodes

    def _as_rows(self, x: ir.Value) -> ir.Value:
        """Return ``x`` as a matrix (tokens, in).

        tensorrt_rtx 1.7 fuses the int4 weight into products of matrices; into a product of a batch
        whose input comes from a transpose (attention's) it does not, and widens the weight in a
        kernel of its own at every run.
        """
        assert x.shape is not None
        dims = [int(dim) for dim in x.shape.numpy()]
        if len(dims) == 2:
            return x
        rows = (int(np.prod(dims[:-1])), dims[-1])
        return self._reshape(x, rows, "rows")

    def _product(self, site: TargetSite, x: ir.Value, weight: ir.Value) -> None:
        old = self._mark.outputs[0]
        assert old.shape is not None and x.shape is not None
        made = ir.Shape((*x.shape.numpy()[:-1], old.shape.numpy()[-1]))
        out = self._add("MatMul", [x, weight], made, self._half, "")
        if made != old.shape:
            out = self._reshape(out, [int(dim) for dim in old.shape.numpy()], "batch")
        if site.bias is not None:
            bias = site.bias.detach().float().numpy().astype(self._numpy)
            bias_value = self._constant(site.site, "bias", bias, self._half)
            out = self._add("Add", [out, bias_value], old.shape, self._half, "bias_add")
        self._replace(old, out)

    def _int4(self, site: TargetSite) -> ir.Value:
        integers = site.weight
        assert isinstance(integers, QuantizedWeight)
        codes = integers.codes.numpy().T.astype(ml_dtypes.int4)
        scales = integers.scales.float().numpy().T.astype(self._numpy)
        return self._dequantize(
            site.site, codes, scales, ir.DataType.INT4, axis=0, block_size=integers.block
        )

    def _static(self, site: TargetSite, source: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return the quantized input, shared by the sites that read the same tensor, and the weight."""
        static = site.static
        assert static is not None
        smoothing, scale = static.smoothing.numpy(), static.scale
        top, kind = (
            (INT8_MAX, ir.DataType.INT8)
            if site.format == "int8"
            else (FP8_MAX, ir.DataType.FLOAT8E4M3FN)
        )
        weight = _array(site.weight)
        if static.exponent is not None:
            smoothing = smoothing * np.float32(scale * top / _SMOOTHED_RANGE)
            scale = _SMOOTHED_RANGE / top
            weight = weight * smoothing
        stored, scales = (
            integer_columns(weight, self._numpy)
            if site.format == "int8"
            else fp8_tensor(weight, self._numpy)
        )
        dequantized = self._dequantize(site.site, stored.T, scales, kind, axis=1)
        key = (id(source), id(static))
        if key not in self._shared:
            x = self._half_input(source)
            if static.exponent is not None:
                inverse = (1 / smoothing).astype(self._numpy)
                factor = self._constant(site.site, "smoothing", inverse, self._half)
                x = self._add("Mul", [x, factor], x.shape, self._half, "input_smooth")
            step = self._constant(
                site.site, "input_scale", np.array(scale, self._numpy), self._half
            )
            codes = self._add(
                "QuantizeLinear", [x, step], x.shape, kind, "input_q", output_dtype=kind.value
            )
            self._shared[key] = self._add(
                "DequantizeLinear", [codes, step], x.shape, self._half, "input_dq"
            )
        return self._shared[key], dequantized

    def _nvfp4_input(self, site: TargetSite, source: ir.Value) -> ir.Value:
        """Return the input, quantized in blocks at run time below one static scale, shared as in int8."""
        static = site.static
        assert static is not None
        key = (id(source), id(static))
        if key not in self._shared:
            x = self._half_input(source)
            assert x.shape is not None
            *rows, width = [int(dim) for dim in x.shape.numpy()]
            scale = self._tensor_scale(site.site, "input_scale", static.scale)
            codes, scales = self._quantize_blocks(x, scale, ir.Shape((*rows, width // BLOCK)))
            self._shared[key] = self._two_levels(codes, scales, scale, axis=-1, what="input")
        return self._shared[key]

    def _quantize_blocks(
        self, x: ir.Value, scale: ir.Value, scales_shape: ir.Shape
    ) -> tuple[ir.Value, ir.Value]:
        node = ir.node(
            DYNAMIC_QUANTIZE, [x, scale], domain="trt", num_outputs=2, name=f"{self._name}.input_q",
            attributes={"axis": -1, "block_size": BLOCK, "scale_type": ir.DataType.FLOAT8E4M3FN.value},
        )  # fmt: skip
        codes, scales = node.outputs
        codes.name, codes.shape = f"{node.name}.out", x.shape
        codes.type = ir.TensorType(ir.DataType.FLOAT4E2M1)
        scales.name, scales.shape = f"{node.name}.scales", scales_shape
        scales.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
        self._graph.insert_before(self._mark, node)
        self.nodes.add(node)
        return codes, scales

    def _nvfp4_weight(self, site: TargetSite) -> ir.Value:
        """Return the weight (in, out) in blocks along its first axis."""
        codes, scales, scale = weight_blocks(_array(site.weight))
        narrow = self._constant(
            site.site, "weight", np.ascontiguousarray(codes.T), ir.DataType.FLOAT4E2M1
        )
        block_scales = self._constant(
            site.site, "weight_scale", np.ascontiguousarray(scales.T), ir.DataType.FLOAT8E4M3FN
        )
        tensor_scale = self._tensor_scale(site.site, "weight_tensor_scale", float(scale))
        return self._two_levels(narrow, block_scales, tensor_scale, axis=0, what="weight")

    def _tensor_scale(self, site: str, what: str, scale: float) -> ir.Value:
        return self._constant(site, what, np.array(scale, np.float32), ir.DataType.FLOAT)

    def _two_levels(
        self, codes: ir.Value, scales: ir.Value, scale: ir.Value, *, axis: int, what: str
    ) -> ir.Value:
        """Return codes * (scales * scale) in half precision; the scales need the range of float32."""
        wide = ir.DataType.FLOAT
        steps = self._add("DequantizeLinear", [scales, scale], scales.shape, wide, f"{what}_steps")
        x = self._add(
            "DequantizeLinear", [codes, steps], codes.shape, wide, f"{what}_dq", axis=axis, block_size=BLOCK
        )  # fmt: skip
        return self._add("Cast", [x], codes.shape, self._half, f"{what}_half", to=self._half.value)


def _array(weight: Tensor | QuantizedWeight) -> NDArray[np.float32]:
    if isinstance(weight, QuantizedWeight):
        weight = weight.dequantize()
    array: NDArray[np.float32] = weight.detach().float().numpy()
    return array
