"""What a TensorRT's ONNX parser reads, checked at export: operators, opset, and number types.

Operators are those of onnx-tensorrt's docs/operators.md (10.15 list; those of opset 23, and TensorRT's own
for 4-bit floats, only from the version that added them). A graph that breaks a rule would fail minutes later, on the robot.
"""

from __future__ import annotations

import onnx_ir as ir

from quantvla.export.nvfp4 import DYNAMIC_QUANTIZE
from quantvla.runtime.errors import explain
from quantvla.runtime.targets import Target

_READ = frozenset(
    """Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast CastLike
    Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace
    DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements
    GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GroupNormalization GRU
    HardSigmoid HardSwish Identity InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less
    LessOrEqual Log LogSoftmax LpNormalization MatMul Max MaxPool Mean Min Mod Mul Neg Not OneHot Or Pad Pow
    PRelu QuantizeLinear Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean
    ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize Round ScatterElements ScatterND Selu
    Shape Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum
    Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor""".split()  # noqa: SIM905
)
_SINCE = {"Attention": (10, 15), "RMSNormalization": (10, 15), "RotaryEmbedding": (10, 15)}
_OWN = {f"trt::{DYNAMIC_QUANTIZE}": (10, 8)}
_TYPES = frozenset(
    """FLOAT FLOAT16 BFLOAT16 INT32 INT64 INT8 BOOL INT4 FLOAT8E4M3FN FLOAT4E2M1""".split()  # noqa: SIM905
)
_FORMAT_OF_TYPE = {
    "BFLOAT16": "bf16", "INT4": "int4", "INT8": "int8", "FLOAT8E4M3FN": "fp8", "FLOAT4E2M1": "nvfp4",
}  # fmt: skip


def check_graph(model: ir.Model, stage: str, target: Target, formats: tuple[str, ...]) -> None:
    """Raise `QuantVLAError` naming the first node or tensor that the target's TensorRT does not read.

    ``formats``: what the GPU runs, see `quantvla.runtime.targets.formats_of`.
    """
    library = f"{target.library} {'.'.join(map(str, target.version))}"
    opset = model.graph.opset_imports.get("", 0)
    if opset > target.opset:
        raise explain(
            f"stage {stage}", f"{library} reads ONNX opset {target.opset} at most", got=opset,
            remedy="export for a newer TensorRT (see `quantvla targets`)",
        )  # fmt: skip
    for node in model.graph:
        _check_operator(node, stage, target, library)
        for value in node.outputs:
            _check_type(value, node, stage, library, formats)
    for value in model.graph.initializers.values():
        _check_type(value, None, stage, library, formats)


def _check_operator(node: ir.Node, stage: str, target: Target, library: str) -> None:
    standard = node.domain in ("", "ai.onnx")
    operator = node.op_type if standard else f"{node.domain}::{node.op_type}"
    since = _SINCE.get(operator) or _OWN.get(operator)
    rtx = target.library != "tensorrt"
    known = operator in _READ or (since is not None and (rtx or target.version >= since))
    if not known:
        raise explain(
            f"stage {stage}, node {node.name}",
            f"{library} has no operator for it",
            got=operator,
            remedy="export for the target 'cpu', or express it with operators TensorRT reads",
        )


def _check_type(
    value: ir.Value, node: ir.Node | None, stage: str, library: str, formats: tuple[str, ...]
) -> None:
    if value.dtype is None:
        return
    kind = value.dtype.name
    where = f"stage {stage}, {f'node {node.name}' if node else f'constant {value.name}'}"
    if kind not in _TYPES:
        raise explain(
            where, f"{library} does not compute in this type", got=kind.lower(),
            remedy="cast it to float32 in the policy, or evaluate it at compile time",
        )  # fmt: skip
    wanted = _FORMAT_OF_TYPE.get(kind)
    if wanted is not None and wanted not in formats:
        raise explain(
            where, f"the GPU has no {wanted}", got=kind.lower(),
            remedy=f"export with another --precision or --activations (it has {', '.join(formats)})",
        )  # fmt: skip
