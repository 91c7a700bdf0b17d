"""Every stage of a policy as a graph whose linears are marks, and the weights that are put in their place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor, nn

from quantvla.export.graphs import export_graph
from quantvla.export.site_marks import SiteMark
from quantvla.export.time_tables import tabulate_marks_
from quantvla.families.base import LoadedPolicy, replaced
from quantvla.progress import Progress
from quantvla.quantized_linear import QuantizedLinear
from quantvla.quantizer import QuantizedWeight


@dataclass(frozen=True)
class MarkedGraphs:
    """Every stage's graph with its linears as marks, the same for all number formats.

    ``only_own_times``: the repeated one has tables for the sampler's times and is wrong for any other.
    """

    stages: Mapping[str, ir.Model]
    only_own_times: bool


def marked_graphs(loaded: LoadedPolicy, progress: Progress) -> MarkedGraphs:
    """Return the graphs of a policy; linears that only see the time are tables in them."""
    marked: dict[str, nn.Module] = {
        site.name: SiteMark(site.name, site.out_features) for site in loaded.used_sites
    }
    graphs = {}
    with replaced(loaded.policy, marked):
        for index, stage in enumerate(loaded.stages):
            progress(f"exporting {stage.name}", index, len(loaded.stages))
            graphs[stage.name] = export_graph(stage)
    progress("exporting", len(loaded.stages), len(loaded.stages))
    sampler = loaded.interface.sampler

    def linear(site: str) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        module = loaded.policy.get_submodule(site)
        bias = stored_bias(module)
        weight = float_weight(stored_weight(module)).float().numpy()
        return weight, None if bias is None else bias.detach().float().numpy()

    only_own_times = tabulate_marks_(graphs[sampler.stage], sampler, linear)
    return MarkedGraphs(graphs, only_own_times)


def stored_weight(module: nn.Module) -> Tensor | QuantizedWeight:
    """Return the weight (out, in) of a linear: floats, or integers on a grid."""
    if isinstance(module, QuantizedLinear):
        return module.quantized
    assert isinstance(module, nn.Linear)
    return module.weight.detach()


def float_weight(weight: Tensor | QuantizedWeight) -> Tensor:
    """Return a weight as the floats it stands for."""
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


def stored_bias(module: nn.Module) -> Tensor | None:
    """Return the bias (out,) of a linear, None if it has none."""
    bias = module.bias
    return bias if isinstance(bias, Tensor) else None
