"""What else could lower the error of static int8 inputs on a GPU, and of 4-bit floats: measured on the reference policy.

    python benchmarks/tensorrt/variants.py        # writes benchmarks/tensorrt/variants.json

- rotations: the recipe passes fold_norms and rotate (R1 on residual streams, R2 on value heads), which leave
  the float policy unchanged, before calibration and export
- the token embedding in int8 (a scale for each row) and int4 (for each block of 32), all else in half precision
- scales per denoise step: the denoise graph with the scales of one step's own inputs, one graph for each step

Same frames, noise and error as benchmarks/tensorrt/run.py; graphs run by ONNX Runtime on the CPU, unfused.
A run that is called again skips what is in the result.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import torch
from bench import Bench, with_scheme
from comparison import ActionError, Comparison, OrtEngine
from torch import Tensor, nn

from quantvla import staged
from quantvla.calib_sets import CalibrationSet
from quantvla.calibrate import frame_noise
from quantvla.export.marked_graphs import marked_graphs
from quantvla.families.base import LoadedPolicy
from quantvla.layout import make_plan
from quantvla.passes.fold_norms import FoldNorms
from quantvla.passes.rotate import Rotate
from quantvla.quantize import make_pipeline
from quantvla.runtime.site_formats import read_formats
from quantvla.statistics import SiteStatistics
from quantvla.weight_store import DirectoryStore

HERE = Path(__file__).parent
PASSES = {"none": (), "fold_norms": (FoldNorms(),), "rotate": (FoldNorms(), Rotate())}


class Row(msgspec.Struct, kw_only=True):
    """One variant. ``left_out``: linears in half precision because one int8 scale is not enough."""

    passes: str
    format: str
    grid_bits: int
    error: ActionError
    left_out: list[str]
    per_step: bool = False
    embedding: str = "half"


VARIANTS = (
    ("int8", 8, False, "half"), ("int8", 8, True, "half"), ("nvfp4", 8, False, "half"),
    ("nvfp4", 4, False, "half"), ("fp16", 16, False, "int8"), ("fp16", 16, False, "int4"),
)  # fmt: skip
"""Format, bits of the grid that weights are on (16: not rounded), scales per denoise step, token embedding."""


def step_statistics(
    loaded: LoadedPolicy, sites: tuple[str, ...], frames: CalibrationSet
) -> list[dict[str, SiteStatistics]]:
    """Return the statistics of denoise sites' inputs, apart for each step of the sampler."""
    steps = {stage.name: stage.repeat for stage in loaded.stages}["denoise"]
    widths = {site.name: site.in_features for site in loaded.sites}
    found = [{s: SiteStatistics.empty(widths[s]) for s in sites} for _ in range(steps)]
    calls = dict.fromkeys(sites, 0)

    def hook(site: str) -> object:
        def see(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[calls[site] % steps][site].add_(inputs[0], len(frames))
            calls[site] += 1

        return loaded.policy.get_submodule(site).register_forward_pre_hook(see)

    handles = [hook(site) for site in sites]
    preprocess = staged.make_preprocessor(loaded.interface)
    with torch.no_grad():
        for index in range(len(frames)):
            tensors = staged.prepare(preprocess, frames[index].observation)
            noise = frame_noise(0, index, loaded.interface.sampler.noise_shape)
            staged.sample(loaded, staged.run_context(loaded, tensors), noise)
    for handle in handles:
        handle.remove()  # type: ignore[attr-defined]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every variant that is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", type=Path, default=Path("examples/metaworld/policy"))
    parser.add_argument("--calib", type=Path, default=Path("calib_sets/metaworld"))
    parser.add_argument("--frames", type=int, default=256, help="calibration frames")
    parser.add_argument("--heldout", type=int, default=64, help="frames of the comparison")
    parser.add_argument("--work", type=Path, default=Path("build/tensorrt_variants"))
    parser.add_argument("-o", "--output", type=Path, default=HERE / "variants.json")
    parser.add_argument("--passes", nargs="+", choices=tuple(PASSES), default=tuple(PASSES))
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    if options.output.is_file():
        rows = msgspec.json.decode(options.output.read_bytes(), type=list[Row])
    for name in options.passes:
        measure(name, options, rows)


def measure(name: str, options: argparse.Namespace, rows: list[Row]) -> None:
    """Measure int8 and 4-bit floats after the passes of one variant, and scales per step without passes."""
    done = {(row.passes, row.format, row.grid_bits, row.per_step, row.embedding) for row in rows}
    wanted = [
        variant
        for variant in VARIANTS
        if (name, *variant) not in done and (name == "none" or variant[1:3] == (8, False))
    ]
    if not wanted:
        return
    options.work = Path(options.work) / name
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    comparison = Comparison(bench)
    loaded, calibration = bench.loaded, bench.calibration.part("calibration")
    if PASSES[name]:
        with TemporaryDirectory() as work:
            make_pipeline(
                loaded, bench.plan, calibration, DirectoryStore(Path(work)), seed=0, work=Path(work),
                progress=lambda *_: None,
            ).run(PASSES[name])  # fmt: skip
        bench.graphs = marked_graphs(loaded, lambda *_: None)
    for number_format, bits, per_step, embedding in wanted:
        bench.restore_()
        rounded = bits < 16
        scheme = f"w{bits}a8" if rounded else "float"
        plan = make_plan(loaded.sites, with_scheme(bench.recipe, scheme))
        bench.plan = plan
        own: list[dict[str, SiteStatistics]] = [{}]
        if per_step:
            sites = tuple(e.site for e in plan.quantized if e.stage == "denoise")
            own = step_statistics(loaded, sites, calibration)
        if rounded:
            bench.statistics()
            bench.quantize_()
        engines = [
            bench.export(
                plan, number_format if rounded else "float", f"{number_format}_{bits}_{index}", found, embedding
            )
            for index, found in enumerate(own)
        ]  # fmt: skip
        error = comparison.error(comparison.graph_chunks(OrtEngine(engines[0], engines)))
        quantized = {entry.site for entry in plan.quantized}
        left = [
            s.site for s in read_formats(engines[0]).sites
            if s.site in quantized and s.format != number_format
        ]  # fmt: skip
        row = Row(passes=name, format=number_format, grid_bits=bits, error=error, left_out=left, per_step=per_step, embedding=embedding)  # fmt: skip
        print(row, flush=True)
        rows.append(row)
        data = msgspec.json.format(msgspec.json.encode(rows), indent=1) + b"\n"
        options.output.write_bytes(data)
    options.work = options.work.parent


if __name__ == "__main__":
    main()
