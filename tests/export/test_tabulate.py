"""Weights that only the time reaches become tables; others stay, and so does a graph without such weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor, nn

from quantvla.export.graphs import export_graph
from quantvla.export.rewrites.tabulate import tabulate_time_
from quantvla.families.base import Stage
from quantvla.runtime.manifest import TensorSpec

TIMES = (0.0, 0.25, 0.5, 0.75)
X = TensorSpec(name="x", dtype="float32", shape=(1, 3, 8))
TIME = TensorSpec(name="time", dtype="float32", shape=(1,))
V = TensorSpec(name="v", dtype="float32", shape=(1, 3, 8))


class Modulated(nn.Module):
    """x scaled by a linear of the time, then a linear of its own; ``plain``: by the time itself."""

    def __init__(self, *, plain: bool) -> None:
        super().__init__()
        self.of_time, self.own, self.plain = nn.Linear(2, 8), nn.Linear(8, 8), plain

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        waves = torch.stack([time.sin(), time.cos()], dim=-1)
        scale = waves.sum(-1) if self.plain else torch.tanh(self.of_time(waves))
        result: Tensor = self.own(x * (1 + scale))
        return result


def exported(*, plain: bool) -> tuple[Modulated, ir.Model]:
    torch.manual_seed(0)
    module = Modulated(plain=plain).eval()
    return module, export_graph(Stage("denoise", module, (X, TIME), (V,)))


def test_results_are_the_same_at_every_time_and_the_weights_are_gone() -> None:
    module, model = exported(plain=False)
    found = tabulate_time_(model, "time", TIMES)
    assert found.nodes > 0 and found.table_bytes == len(TIMES) * 8 * 4
    assert found.removed_bytes > 0
    assert not any("of_time" in name for name in model.graph.initializers)
    assert any("own" in name for name in model.graph.initializers)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    x = np.random.default_rng(0).standard_normal(X.shape, np.float32)
    for t in TIMES:
        time = np.array([t], np.float32)
        (ours,) = session.run(None, {"x": x, "time": time})
        with torch.no_grad():
            theirs = module(torch.from_numpy(x), torch.from_numpy(time)).numpy()
        assert np.abs(ours - theirs).max() < 1e-6


def test_a_graph_where_the_time_reaches_no_weight_alone_is_left_for_any_time() -> None:
    _, model = exported(plain=True)
    before = [node.op_type for node in model.graph]
    assert tabulate_time_(model, "time", TIMES).nodes == 0
    assert [node.op_type for node in model.graph] == before
    assert tabulate_time_(model, "no such input", TIMES).nodes == 0
