"""All stages of a policy through TensorRT's builder in every number format, and the INT8 graph's numbers.

    python benchmarks/tensorrt/run.py                                     # the reference policy
    python benchmarks/tensorrt/run.py --policy build/full_size/policy --calib build/full_size/set \\
        --frames 6 --heldout 0 -o benchmarks/tensorrt/full_size.json      # 450 M parameters, random weights

Plans are built by tensorrt_rtx for GPUs that need not be there; nothing is run on a GPU. The INT8 graph is
run by ONNX Runtime on the CPU, unfused, and its action error compared with that of W8A8 in the arithmetic
of the CPU kernels (8-bit weights and activations, a scale per token and block) on the same frames and noise.
The result is written after every build, and a run that is called again skips what is in it.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from bench import Bench, with_scheme
from comparison import ActionError, Comparison, OrtEngine

from quantvla.export.source import FLOAT_RECIPE
from quantvla.export.tensorrt_engine import STATIC
from quantvla.layout import make_plan
from quantvla.plan import Plan
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.site_formats import read_formats
from quantvla.runtime.tensorrt_build import BuildOptions, build_engine
from quantvla.runtime.tensorrt_plans import StagePlan
from quantvla.testing.rounded import quantize_in_memory_
from quantvla.versions import compiler_versions

HERE = Path(__file__).parent
FORMATS = ("fp16", "int8", "int4", "fp8", "nvfp4")


class Build(msgspec.Struct, kw_only=True):
    """One stage in one format for one GPU; ``refused`` says why there is no plan."""

    format: str
    compute_capability: int
    stage: str
    build_s: float | None = None
    plan_bytes: int | None = None
    linears: dict[str, int] = {}
    fallbacks: list[str] = []
    layers: dict[str, int] = {}
    refused: str = ""


class Numerics(msgspec.Struct, kw_only=True):
    """Same frames and noise for all; ``ratio`` of the RMS errors of target int8 and CPU W8A8.

    ``left_out``: linears that stay in half precision because one int8 scale is not enough, with the reason.
    """

    frames: int
    cpu_w8a8: ActionError
    target_int8: ActionError
    target_fp16: ActionError
    ratio: float
    linears: int
    left_out: dict[str, str]


class Result(msgspec.Struct, kw_only=True):
    """What is written."""

    policy: str
    frames: int
    library: str
    weights: dict[str, int] = {}
    builds: list[Build] = []
    four_bit_share_of_fp16: dict[str, float] = {}
    numerics: Numerics | None = None
    versions: dict[str, str] = {}


def build_all(bench: Bench, result: Result, write: Any) -> None:
    """Build every stage in every format for every GPU that is missing in ``result``."""
    done = {(b.format, b.compute_capability) for b in result.builds}
    for number_format in bench.options.formats:
        wanted = [sm for sm in bench.options.compute_capability if (number_format, sm) not in done]
        if not wanted:
            continue
        precision = "float" if number_format == "fp16" else number_format
        if number_format in STATIC:
            bench.statistics()
        if number_format != "fp16":
            bench.quantize_()
        engine = bench.export(bench.plan, precision, number_format)
        for sm in wanted:
            print("build", number_format, sm, flush=True)
            try:
                record = build_engine(engine, BuildOptions(sm, allow_fallback=True))
            except QuantVLAError as error:
                refused = str(error).replace(str(engine), engine.name)
                stages = [stage.name for stage in bench.loaded.stages]
                result.builds += [
                    Build(format=number_format, compute_capability=sm, stage=stage, refused=refused)
                    for stage in stages
                ]
            else:
                result.builds += [build_row(number_format, sm, plan) for plan in record.stages]
            write()
        shutil.rmtree(engine)


def build_row(number_format: str, sm: int, plan: StagePlan) -> Build:
    """Return what is kept of a stage's record."""
    linears: dict[str, int] = {}
    for site in plan.sites:
        linears[site.ran] = linears.get(site.ran, 0) + 1
    return Build(
        format=number_format, compute_capability=sm, stage=plan.stage, build_s=plan.build_s,
        plan_bytes=plan.plan_bytes, linears=linears, layers=plan.layers,
        fallbacks=[f"{s.site}: {s.planned} -> {s.ran}" for s in plan.sites if not s.kept],
    )  # fmt: skip


def shares(builds: Sequence[Build]) -> dict[str, float]:
    """Return plan bytes of the 4-bit build over those of the fp16 build, by stage and GPU."""
    sizes = {(b.format, b.compute_capability, b.stage): b.plan_bytes for b in builds}
    found = {}
    for (number_format, sm, stage), size in sizes.items():
        half = sizes.get(("fp16", sm, stage))
        if number_format == "int4" and size and half:
            found[f"{stage} SM{sm}"] = round(size / half, 4)
    return found


def numerics(bench: Bench) -> Numerics:
    """Return the action errors of CPU W8A8 and of the target graphs."""
    comparison = Comparison(bench)

    def graph_error(plan: Plan, precision: str, name: str) -> ActionError:
        directory = bench.export(plan, precision, name)
        return comparison.error(comparison.graph_chunks(OrtEngine(directory)))

    loaded = bench.loaded
    eight = make_plan(loaded.sites, with_scheme(bench.recipe, "w8a8"))
    half = graph_error(bench.plan, "float", "numerics_fp16")
    bench.statistics()
    quantize_in_memory_(loaded, eight)
    cpu = comparison.error(comparison.torch_chunks())
    target = graph_error(eight, "int8", "numerics_int8")
    bench.restore_()
    sites = read_formats(bench.options.work / "numerics_int8").sites
    quantized = {entry.site for entry in eight.quantized}
    return Numerics(
        frames=comparison.frames, cpu_w8a8=cpu, target_int8=target, target_fp16=half, ratio=target.rms / cpu.rms,
        linears=len(quantized),
        left_out={s.site: s.reason for s in sites if s.site in quantized and s.format != "int8"},
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Build, compare, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", type=Path, default=Path("examples/metaworld/policy"))
    parser.add_argument("--calib", type=Path, default=Path("calib_sets/metaworld"))
    parser.add_argument("--frames", type=int, default=256, help="calibration frames")
    parser.add_argument(
        "--heldout", type=int, default=64, help="frames of the comparison, 0 for none"
    )
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--compute-capability", nargs="+", type=int, default=[89, 86, 120])
    parser.add_argument("--work", type=Path, default=Path("build/tensorrt"))
    parser.add_argument("-o", "--output", type=Path, default=HERE / "reference.json")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.output.is_file():
        result = msgspec.json.decode(options.output.read_bytes(), type=Result)
    else:
        import tensorrt_rtx

        result = Result(
            policy=options.policy.as_posix(), frames=options.frames,
            library=f"tensorrt_rtx {tensorrt_rtx.__version__}", versions=compiler_versions(),
        )  # fmt: skip

    def write() -> None:
        result.four_bit_share_of_fp16 = shares(result.builds)
        data = msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n"
        options.output.write_bytes(data)

    bench = Bench(options)
    result.weights = {
        stage.name: sum(e.bytes_before for e in bench.plan.entries if e.stage == stage.name)
        for stage in bench.loaded.stages
    }
    assert bench.plan.recipe != FLOAT_RECIPE
    if options.heldout and result.numerics is None:
        result.numerics = numerics(bench)
        write()
    build_all(bench, result, write)


if __name__ == "__main__":
    main()
