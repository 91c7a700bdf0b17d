"""Loop-invariant code motion: what every denoise step would compute alike is computed once.

The repeated stage's nodes that depend on neither the noisy actions nor the time move to the end of
the stage before it; what they hand over becomes that stage's outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantvla.export.rewrites.graph import constant


@dataclass(frozen=True)
class Hoisted:
    """How many nodes moved, and the names of the tensors handed over instead of the original ones."""

    nodes: int
    tensors: tuple[str, ...]


def hoist_invariants_(before: ir.Model, repeated: ir.Model, varying: Collection[str]) -> Hoisted:
    """Move the invariant nodes of ``repeated`` to the end of ``before``.

    ``varying``: the inputs of ``repeated`` that change from step to step. Inputs that ``before``
    does not know become its inputs; an earlier stage or the preprocessing makes them.
    """
    invariant = _invariant_nodes(repeated, varying)
    frontier = _frontier(invariant)
    mover = _Mover(before, "repeated")
    for node in invariant:
        mover.copy(node)
    for index, value in enumerate(frontier):
        _hand_over(mover.known[value], value, repeated, f"context.{index}")
        before.graph.outputs.append(mover.known[value])
    _drop_unused(repeated)
    return Hoisted(len(invariant), tuple(str(value.name) for value in frontier))


def _invariant_nodes(model: ir.Model, varying: Collection[str]) -> list[ir.Node]:
    """Return, in order, the nodes that depend on some input but on none of ``varying``."""
    changing = {value for value in model.graph.inputs if value.name in varying}
    given = {value for value in model.graph.inputs if value.name not in varying}
    nodes = []
    for node in model.graph:
        if any(value in changing for value in node.inputs):
            changing.update(node.outputs)
        elif any(value in given for value in node.inputs):
            given.update(node.outputs)
            if not any(output.is_graph_output() for output in node.outputs):
                nodes.append(node)
    return nodes


def _frontier(invariant: list[ir.Node]) -> list[ir.Value]:
    moved = set(invariant)
    return [
        output
        for node in invariant
        for output in node.outputs
        if any(user not in moved for user in output.consumers())
    ]


class _Mover:
    """Copies nodes of one graph to the end of another."""

    def __init__(self, target: ir.Model, prefix: str) -> None:
        self.target = target
        self.prefix = prefix
        self.known: dict[ir.Value, ir.Value] = {}
        self.taken = {
            str(value.name)
            for values in (target.graph.inputs, *(node.outputs for node in target.graph))
            for value in values
        } | set(target.graph.initializers)

    def copy(self, node: ir.Node) -> None:
        """Append a copy of ``node``; its inputs come from what is known in the target."""
        inputs = [self._input(value) if value is not None else None for value in node.inputs]
        copy = ir.Node(
            node.domain, node.op_type, inputs, list(node.attributes.values()),
            overload=node.overload, num_outputs=len(node.outputs), name=None,
        )  # fmt: skip
        self.target.graph.append(copy)
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type, new.shape = f"{self.prefix}.{old.name}", old.type, old.shape
            self.known[old] = new
        self.target.opset_imports.setdefault(node.domain, node.version or 1)

    def _input(self, value: ir.Value) -> ir.Value:
        if value not in self.known:
            if value.const_value is not None:
                self.known[value] = self._initializer(value)
            elif (producer := value.producer()) is not None:  # of constants only, left unfolded
                self.copy(producer)
            else:
                self.known[value] = self._tensor(value)
        return self.known[value]

    def _tensor(self, value: ir.Value) -> ir.Value:
        """Return the target's tensor of this name: an output, an input, or a new input."""
        graph = self.target.graph
        for candidate in (*graph.outputs, *graph.inputs):
            if candidate.name == value.name:
                return candidate
        new = ir.Value(name=value.name, type=value.type, shape=value.shape)
        graph.inputs.append(new)
        return new

    def _initializer(self, value: ir.Value) -> ir.Value:
        graph, name = self.target.graph, str(value.name)
        found = graph.initializers.get(name)
        if found is not None and _same(constant(value), constant(found)):
            return found
        if name in self.taken:
            name = f"{self.prefix}.{name}"
        self.taken.add(name)
        assert value.const_value is not None
        new = ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
        graph.register_initializer(new)
        return new


def _same(a: NDArray[Any] | None, b: NDArray[Any] | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and np.array_equal(a, b)


def _hand_over(made: ir.Value, wanted: ir.Value, repeated: ir.Model, name: str) -> None:
    """Make ``wanted`` an input of the repeated graph that has the name of the tensor that replaces it."""
    made.name = name
    received = ir.Value(name=name, type=wanted.type, shape=wanted.shape)
    repeated.graph.inputs.append(received)
    ir.convenience.replace_all_uses_with(wanted, received)


def _drop_unused(model: ir.Model) -> None:
    """Remove nodes and inputs that nothing reads."""
    for node in reversed(list(model.graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            model.graph.remove(node, safe=True)
    for value in list(model.graph.inputs):
        if not value.uses() and not value.is_graph_output():
            model.graph.inputs.remove(value)


def keep_outputs_(model: ir.Model, read: Iterable[str]) -> int:
    """Drop the outputs that no later stage reads, and what only they need; returns how many."""
    wanted = set(read)
    dropped = [value for value in model.graph.outputs if value.name not in wanted]
    for value in dropped:
        model.graph.outputs.remove(value)
    return len(dropped)
