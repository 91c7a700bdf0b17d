"""A policy, its statistics and its graphs in memory, exported in any format: what both benchmarks start from."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import msgspec

from quantvla.calib_sets import CalibrationSet, limit, open_set
from quantvla.calibrate import collect_statistics
from quantvla.cli.target_options import GpuOptions, plan_for_gpu
from quantvla.export.marked_graphs import marked_graphs
from quantvla.export.tensorrt_engine import export_tensorrt, static_sites
from quantvla.families import load_policy
from quantvla.layout import make_plan
from quantvla.plan import Plan
from quantvla.recipe import Recipe, read_recipe
from quantvla.statistics import SiteStatistics
from quantvla.testing.rounded import quantize_in_memory_, source_of

HERE = Path(__file__).parent


def with_scheme(recipe: Recipe, scheme: str) -> Recipe:
    """Return the recipe with another scheme for the linears it quantizes."""
    return msgspec.structs.replace(
        recipe, default=msgspec.structs.replace(recipe.default, scheme=scheme)
    )


class Bench:
    """A policy, its statistics and its graphs, made once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.loaded = load_policy(options.policy)
        self.floats = {
            site.name: self.loaded.policy.get_submodule(site.name) for site in self.loaded.sites
        }
        self.recipe = read_recipe(str(HERE / "all_linears.toml"))
        self.plan = make_plan(self.loaded.sites, self.recipe)
        self.calibration = limit(
            open_set(options.calib), frames=options.frames, heldout_frames=max(options.heldout, 1), seed=0
        )  # fmt: skip
        self._seen: dict[str, SiteStatistics] = {}
        self._quantized = False
        print("graphs", flush=True)
        self.graphs = marked_graphs(self.loaded, lambda *_: None)

    def _statistics(self, frames: CalibrationSet) -> dict[str, SiteStatistics]:
        sites = [entry.site for entry in self.plan.quantized]
        journal = self.options.work / "journal"
        return collect_statistics(
            self.loaded, sites, frames, seed=0, journal=journal,
            progress=lambda what, done, total: print(what, done, total, flush=True),
        )  # fmt: skip

    def statistics(self) -> dict[str, SiteStatistics]:
        """Return the statistics of the float policy's inputs, collected at the first call."""
        if not self._seen:
            self.restore_()
            self._seen = self._statistics(self.calibration.part("calibration"))
        return self._seen

    def quantize_(self) -> None:
        """Put the plan's integer linears in place, once."""
        if not self._quantized:
            quantize_in_memory_(self.loaded, self.plan)
            self._quantized = True

    def restore_(self) -> None:
        """Put the float linears back."""
        self._quantized = False
        for name, module in self.floats.items():
            self.loaded.policy.set_submodule(name, module)

    def export(
        self, plan: Plan, precision: str, name: str, own: Mapping[str, SiteStatistics] = {},
        embedding: str = "half",
    ) -> Path:  # fmt: skip
        """Write the engine of the policy as it is in memory; ``own`` statistics take the place of the usual ones.

        Formats with static input scales need `statistics` to have been called before.
        """
        output = Path(self.options.work) / name
        board = "rtx-5090" if precision == "nvfp4" else None
        made = plan_for_gpu(
            self.loaded, plan, GpuOptions("rtx", board, "fp16", precision, embedding)
        )
        needed = static_sites(made)
        assert self._seen or not needed, "call statistics() first, while the policy is float"
        seen = {**self._seen, **own} if needed else {}
        export_tensorrt(
            source_of(self.loaded, plan), made, seen, output, graphs=self.graphs, overwrite=True
        )
        return output
