"""The sampler's update inside the denoise graph, so that a GPU runs the whole loop without the host."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quantvla.runtime.manifest import EulerSampler, TensorSpec


def next_state_spec(sampler: EulerSampler) -> TensorSpec:
    """Return the extra output ``<state>_next`` = state + step * velocity, float32."""
    return TensorSpec(name=f"{sampler.state}_next", dtype="float32", shape=sampler.noise_shape)


def add_next_state_(model: ir.Model, sampler: EulerSampler) -> None:
    """Add that output to the graph of the sampler's stage."""
    graph = model.graph
    state = next(value for value in graph.inputs if value.name == sampler.state)
    velocity = next(value for value in graph.outputs if value.name == sampler.velocity)
    assert isinstance(sampler.step, float), "GPU engines have equal steps"
    step = np.array(sampler.step, np.float32)
    constant = ir.Value(
        name="sampler.step", shape=ir.Shape(()), type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(step, name="sampler.step"),
    )  # fmt: skip
    graph.register_initializer(constant)
    scaled = ir.node("Mul", [velocity, constant], name="sampler.scaled_velocity")
    moved = ir.node("Add", [state, scaled.outputs[0]], name="sampler.next_state")
    spec = next_state_spec(sampler)
    for node, name in ((scaled, "sampler.scaled_velocity.out"), (moved, spec.name)):
        value = node.outputs[0]
        value.name, value.shape = name, ir.Shape(spec.shape)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        graph.append(node)
    graph.outputs.append(moved.outputs[0])
