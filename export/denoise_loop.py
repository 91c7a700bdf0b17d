"""All denoise steps as one graph: a chunk then takes one call of the engine library, not one for each step.

A call costs time in the library and in Python that a small policy notices. The arithmetic and its order
are the single step's and `euler_integrate`'s, so that the chunk is the same to the last bit. Weights are
those of the single step's file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from quantvla.export.rewrites.graph import Editor
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
    graph, shape = model.graph, sampler.noise_shape
    state, time = (_named(graph.inputs, name) for name in (sampler.state, sampler.time))
    velocity = _named(graph.outputs, sampler.velocity)
    graph.outputs.clear()
    index = _value("loop.index", (), ir.DataType.INT64)
    going_on = _value("loop.going_on", (), ir.DataType.BOOL)
    x = _value("loop.state", shape)

    begin = Editor(model, graph[0])
    times = begin.constant("loop.times", np.array(sampler.timesteps, np.float32)[:, None])
    sizes = begin.constant("loop.sizes", np.array(sampler.sizes, np.float32))
    count = begin.constant("loop.count", np.array(len(sampler.timesteps), np.int64))
    at = begin.add("Gather", [times, index], shape=(1,))
    size = begin.add("Gather", [sizes, index], shape=())
    ir.convenience.replace_all_uses_with([state, time], [x, at])
    still = ir.node("Identity", [going_on])
    still.outputs[0].type, still.outputs[0].shape = ir.TensorType(ir.DataType.BOOL), ir.Shape(())
    graph.append(still)
    end = Editor(model, still)
    moved = end.add("Add", [x, end.add("Mul", [size, velocity], shape=shape)], shape=shape)

    nodes = list(graph)
    graph.remove(nodes)
    body = ir.Graph([index, going_on, x], [still.outputs[0], moved], nodes=nodes, name="step")
    graph.inputs[:] = [value for value in graph.inputs if value is not time]
    chunk = _value(output, shape)
    graph.append(
        ir.Node("", "Loop", [count, None, state], [ir.AttrGraph("body", body)], outputs=[chunk])
    )
    graph.outputs.append(chunk)


def _named(values: Sequence[ir.Value], name: str) -> ir.Value:
    return next(value for value in values if value.name == name)


def _value(name: str, shape: tuple[int, ...], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
