"""All stages of a policy as graphs: exported, rewritten, and loop invariants moved out of the repeated one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from quantvla.export.graphs import export_graph
from quantvla.export.rewrites import SHORTEN, SIMPLIFY, Rewrite, apply_rewrites_
from quantvla.export.rewrites.graph import shape_of
from quantvla.export.rewrites.hoist import hoist_invariants_, keep_outputs_
from quantvla.export.rewrites.tabulate import tabulate_time_
from quantvla.families.base import Stage
from quantvla.progress import Progress
from quantvla.runtime.errors import explain
from quantvla.runtime.manifest import EulerSampler, TensorSpec

_DTYPES = {
    ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32", ir.DataType.BOOL: "bool",
}  # fmt: skip


@dataclass(frozen=True)
class StageGraph:
    """A stage's graph; its tensors are those of the graph, which hoisting changes.

    ``applied``: how often each rewrite changed it after export.
    ``only_own_times``: it has tables for the sampler's times and is wrong for any other.
    """

    name: str
    repeat: int
    model: ir.Model
    applied: Mapping[str, int]
    only_own_times: bool = False

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The tensors the graph reads."""
        return tuple(_spec(self.name, value) for value in self.model.graph.inputs)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors the graph returns."""
        return tuple(_spec(self.name, value) for value in self.model.graph.outputs)


def build_graphs(
    stages: Sequence[Stage],
    sampler: EulerSampler,
    fusions: Sequence[Rewrite],
    progress: Progress = lambda _what, _done, _total: None,
    *,
    keep: Collection[str] = (),
) -> tuple[StageGraph, ...]:
    """Return the graphs of ``stages``, in order, ready for a target whose operators ``fusions`` use.

    ``keep`` names outputs that stay although no stage reads them.
    """
    graphs = []
    for index, stage in enumerate(stages):
        progress(f"exporting {stage.name}", index, len(stages))
        model = export_graph(stage)
        applied = apply_rewrites_(model, (*SIMPLIFY, *fusions, *SHORTEN))
        graphs.append(StageGraph(stage.name, stage.repeat, model, applied))
    progress("exporting", len(stages), len(stages))
    tables = tabulate_time_(graphs[-1].model, sampler.time, sampler.timesteps)
    if tables.nodes:
        applied = {**graphs[-1].applied, "tabulate the time": tables.nodes}
        graphs[-1] = replace(graphs[-1], only_own_times=True, applied=applied)
    hoist(graphs, sampler, keep)
    return tuple(graphs)


def hoist(graphs: Sequence[StageGraph], sampler: EulerSampler, keep: Collection[str] = ()) -> None:
    """Compute what no denoise step changes once, at the end of the stage before the repeated one."""
    *once, repeated = graphs
    if not once:
        return
    hoist_invariants_(once[-1].model, repeated.model, {sampler.state, sampler.time})
    for index, graph in enumerate(once):
        later = [value.name for other in graphs[index + 1 :] for value in other.model.graph.inputs]
        keep_outputs_(graph.model, [*keep, *(name for name in later if name)])
    for graph in graphs:
        apply_rewrites_(graph.model, (*SIMPLIFY, *SHORTEN))


def _spec(stage: str, value: ir.Value) -> TensorSpec:
    shape, dtype = shape_of(value), value.dtype
    if shape is None or dtype not in _DTYPES:
        raise explain(
            f"stage {stage!r} tensor {value.name!r}",
            "must have a fixed shape and a type that the runtime passes on",
            got=f"{dtype} {value.shape}",
            remedy="export again, and report it if it stays",
        )
    return TensorSpec(name=str(value.name), dtype=_DTYPES[dtype], shape=shape)  # type: ignore[arg-type]
