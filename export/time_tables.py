"""Marked linears that only see the time become tables over the sampler's times, as on every other target.

Their weights would be read at every denoise step for one token; the tables hold one row for each step.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantvla.export.rewrites.folding import fold_constants_
from quantvla.export.rewrites.graph import Editor
from quantvla.export.rewrites.tabulate import nodes_of_time, tabulate_time_
from quantvla.export.site_marks import ATTRIBUTE, is_mark
from quantvla.runtime.manifest import EulerSampler

Array = NDArray[np.float32]
Linear = Callable[[str], tuple[Array, Array | None]]
"""Site -> weight (out, in) and bias (out,) in float32."""


def tabulate_marks_(model: ir.Model, sampler: EulerSampler, linear: Linear) -> bool:
    """Put tables in the place of what ``sampler.time`` alone decides in the repeated stage's marked graph.

    Returns whether there are any: the graph is then right for the sampler's own times only.
    """
    fold_constants_(model)
    given = next((value for value in model.graph.inputs if value.name == sampler.time), None)
    if given is None:
        return False
    for node in nodes_of_time(model, given):
        if is_mark(node):
            _write_product_(model, node, *linear(node.attributes[ATTRIBUTE].as_string()))
    return tabulate_time_(model, sampler.time, sampler.timesteps).nodes > 0


def _write_product_(model: ir.Model, mark: ir.Node, weight: Array, bias: Array | None) -> None:
    """Put the float product in the place of a mark."""
    site, old = mark.attributes[ATTRIBUTE].as_string(), mark.outputs[0]
    assert old.shape is not None
    editor, shape = Editor(model, mark), [int(size) for size in old.shape.numpy()]
    out = editor.add(
        "MatMul", [mark.inputs[0], editor.constant(f"{site}.weight", weight.T)], shape=shape
    )
    if bias is not None:
        out = editor.add("Add", [out, editor.constant(f"{site}.bias", bias)], shape=shape)
    editor.substitute(old, out)
    model.graph.remove(mark, safe=True)
