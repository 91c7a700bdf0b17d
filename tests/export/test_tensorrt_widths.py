"""SmolVLA at its full widths, resolution and token counts through TensorRT's builder, with few layers a tower.

Every distinct shape of a linear and of an attention occurs; `benchmarks/tensorrt/run.py` builds all the layers.
Weights are random, and so are the inputs that scales are made of: neither changes what is built.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from quantvla.cli.target_options import GpuOptions, plan_for_gpu
from quantvla.export.marked_graphs import MarkedGraphs, marked_graphs
from quantvla.export.source import SourcePolicy
from quantvla.export.tensorrt_engine import export_tensorrt, static_sites
from quantvla.families import load_policy
from quantvla.runtime.tensorrt_build import BuildOptions, build_engine
from quantvla.statistics import SiteStatistics
from quantvla.testing.rounded import rounded_source
from quantvla.testing.smolvla import FULL_SIZE, write_random_checkpoint

pytestmark = pytest.mark.slow
# two layers of the language model and of the action expert: one attends to itself, one to the context
SIZE = replace(FULL_SIZE, layers=2, vision_layers=1, vocabulary=512)


@dataclass(frozen=True)
class Wide:
    """The policy with its towers on a 4-bit grid, and its graphs."""

    source: SourcePolicy
    graphs: MarkedGraphs


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Wide:
    directory = tmp_path_factory.mktemp("wide") / "policy"
    write_random_checkpoint(directory, SIZE)
    loaded = load_policy(directory)
    return Wide(rounded_source(loaded), marked_graphs(loaded, lambda *_: None))


def _statistics(wide: Wide, sites: tuple[str, ...]) -> dict[str, SiteStatistics]:
    widths = {site.name: site.in_features for site in wide.source.loaded.sites}
    found = {}
    for index, site in enumerate(sites):
        found[site] = SiteStatistics.empty(widths[site])
        generator = torch.Generator().manual_seed(index)
        found[site].add_(torch.randn(64, widths[site], generator=generator), 1)
    return found


def test_every_shape_of_the_full_policy_occurs(wide: Wide) -> None:
    used = wide.source.loaded.used_sites
    shapes = {(site.part, site.in_features, site.out_features) for site in used}
    assert {("vision", 768, 3072), ("vision", 3072, 768)} <= shapes
    assert {("llm", 960, 2560), ("llm", 2560, 960), ("llm", 960, 320)} <= shapes
    assert {("expert", 720, 2048), ("expert", 2048, 720), ("expert", 320, 320)} <= shapes


@pytest.mark.parametrize(
    ("precision", "board", "capabilities"),
    [
        # half precision on every architecture; of the others each on the oldest that has it: one
        # architecture more builds the same layers from the same graph
        ("float", None, (86, 89, 120)),
        ("int8", None, (86,)),
        ("int4", None, (86,)),
        ("fp8", None, (89,)),
        ("nvfp4", "rtx-5090", (120,)),
    ],
)
def test_full_widths_build_in_every_format(
    wide: Wide, tmp_path: Path, precision: str, board: str | None, capabilities: tuple[int, ...]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    source, engine = wide.source, tmp_path / "engine"
    plan = plan_for_gpu(source.loaded, source.plan, GpuOptions("rtx", board, "fp16", precision))
    statistics = _statistics(wide, static_sites(plan))
    export_tensorrt(source, plan, statistics, engine, graphs=wide.graphs)
    assert source.plan is not None
    wanted = "fp16" if precision == "float" else precision
    for capability in capabilities:
        record = build_engine(engine, BuildOptions(compute_capability=capability))
        ran = {site.site: site for stage in record.stages for site in stage.sites}
        assert all(site.kept for site in ran.values())
        assert all(ran[entry.site].ran == wanted for entry in source.plan.quantized)
