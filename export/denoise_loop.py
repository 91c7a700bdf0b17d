"""All denoise steps as one graph: a chunk then takes one call of the engine library, not one for each step.

On a small policy a call costs about as much as a linear layer, in the library and in Python; the
arithmetic and its order are the single step's and `euler_integrate`'s, so the chunk is the same to
the last bit. Weights are those of the single step's file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import NameFixPass

from quantvla.runtime.manifest import EulerSampler, StageSpec, TensorSpec


def export_loop(directory: Path, stage: StageSpec, sampler: EulerSampler) -> StageSpec:
    """Write the loop over ``stage``, the sampler's, whose files are in ``directory``, and return it as a stage.

    Its inputs are those of ``stage`` without the time, the state being the noise; its output is the
    normalized chunk.
    """
    name = f"{stage.name}_loop"
    spec = StageSpec(
        name=name,
        file=f"{name}.onnx",
        native=f"{name}.native.onnx" if stage.native else "",
        repeat=1,
        inputs=tuple(tensor for tensor in stage.inputs if tensor.name != sampler.time),
        outputs=(TensorSpec(name="chunk", dtype="float32", shape=sampler.noise_shape),),
    )
    files = [(stage.file, spec.file), (stage.native, spec.native)]
    for step, loop in files:
        if step:
            model = ir.load(directory / step)
            repeat_step_(model, sampler, spec.outputs[0].name)
            NameFixPass()(model)
            ir.save(model, directory / loop)
    return spec


def repeat_step_(model: ir.Model, sampler: EulerSampler, output: str) -> None:
    """Turn the graph of one step into that of all, which returns ``output``."""
    graph = model.graph
    nodes = list(graph)
    state, time = (_input(graph, name) for name in (sampler.state, sampler.time))
    (velocity,) = (value for value in graph.outputs if value.name == sampler.velocity)
    graph.outputs.clear()
    graph.remove(nodes)

    times = _constant(graph, "loop.times", np.array(sampler.timesteps, np.float32)[:, None])
    sizes = _constant(graph, "loop.sizes", np.array(sampler.sizes, np.float32))
    count = _constant(graph, "loop.count", np.array(len(sampler.timesteps), np.int64))
    index = _value("loop.index", (), ir.DataType.INT64)
    going_on = _value("loop.going_on", (), ir.DataType.BOOL)
    x = _value("loop.state", sampler.noise_shape)
    at = _node("Gather", [times, index], _value("loop.time", (1,)))
    size = _node("Gather", [sizes, index], _value("loop.size", ()))
    scaled = _node("Mul", [size.outputs[0], velocity], _value("loop.move", sampler.noise_shape))
    moved = _node("Add", [x, scaled.outputs[0]], _value("loop.moved", sampler.noise_shape))
    still = _node("Identity", [going_on], _value("loop.still", (), ir.DataType.BOOL))
    ir.convenience.replace_all_uses_with([state, time], [x, at.outputs[0]])
    body = ir.Graph(
        [index, going_on, x],
        [still.outputs[0], moved.outputs[0]],
        nodes=[at, size, *nodes, scaled, moved, still],
        name="step",
    )
    graph.inputs[:] = [value for value in graph.inputs if value is not time]
    loop = ir.Node(
        "", "Loop", [count, None, state], [ir.AttrGraph("body", body)],
        outputs=[_value(output, sampler.noise_shape)], name="loop",
    )  # fmt: skip
    graph.append(loop)
    graph.outputs.append(loop.outputs[0])


def _input(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for value in graph.inputs if value.name == name)


def _constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = _value(name, array.shape, tensor.dtype)
    value.const_value = tensor
    graph.register_initializer(value)
    return value


def _value(name: str, shape: tuple[int, ...], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _node(operator: str, inputs: list[ir.Value], output: ir.Value) -> ir.Node:
    return ir.Node("", operator, inputs, outputs=[output], name=output.name)
