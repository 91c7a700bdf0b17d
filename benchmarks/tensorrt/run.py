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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from quantvla import staged
from quantvla.calib_sets import CalibrationSet, limit, open_set
from quantvla.calibrate import collect_statistics, frame_noise
from quantvla.checkpoint import install_
from quantvla.export.nvfp4_unfused import unfuse_file
from quantvla.export.source import FLOAT_RECIPE, SourcePolicy
from quantvla.export.tensorrt_engine import STATIC, export_tensorrt, marked_graphs
from quantvla.families import load_policy
from quantvla.families.base import LoadedPolicy
from quantvla.layout import make_plan
from quantvla.plan import Plan
from quantvla.quantizer import quantize_weight
from quantvla.recipe import Recipe, read_recipe
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.manifest import Manifest, Source, read_manifest
from quantvla.runtime.sampler import euler_integrate
from quantvla.runtime.site_formats import read_formats
from quantvla.runtime.targets import BOARDS, TARGETS, boards_of
from quantvla.runtime.tensorrt_build import BuildOptions, build_engine
from quantvla.runtime.tensorrt_plans import StagePlan
from quantvla.site_tokens import count_site_tokens
from quantvla.statistics import SiteStatistics
from quantvla.target_plan import plan_target
from quantvla.versions import compiler_versions

HERE = Path(__file__).parent
FORMATS = ("fp16", "int8", "int4", "fp8", "nvfp4")
Array = NDArray[np.float32]


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


class ActionError(msgspec.Struct):
    """Error of normalized actions against the float policy, relative to the actions' RMS over all frames.

    ``rms`` over all frames; ``median`` and ``largest`` of the frames' own RMS errors.
    """

    rms: float
    median: float
    largest: float


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


def source_of(loaded: LoadedPolicy, plan: Plan) -> SourcePolicy:
    """Return the policy in memory as an export source."""
    origin = Source(checkpoint_sha256="0" * 64, policy_type=loaded.family, calibration_sha256=None)
    return SourcePolicy(loaded, plan.recipe, plan, origin)


def quantize_in_memory_(loaded: LoadedPolicy, plan: Plan) -> None:
    """Replace the plan's linears by integer ones, rounded without weighting."""
    weights = {}
    for entry in plan.quantized:
        linear: Any = loaded.policy.get_submodule(entry.site)
        weights[entry.site] = quantize_weight(
            linear.weight, entry.scheme.weight_bits, entry.scheme.block
        )
    install_(loaded.policy, weights)


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
        self.tokens = count_site_tokens(self.loaded)
        self.calibration = limit(
            open_set(options.calib), frames=options.frames, heldout_frames=max(options.heldout, 1), seed=0
        )  # fmt: skip
        self._seen: dict[str, SiteStatistics] = {}
        self._quantized = False
        print("graphs", flush=True)
        self.graphs: Mapping[str, ir.Model] = marked_graphs(self.loaded, lambda *_: None)

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

    def export(self, plan: Plan, precision: str, name: str) -> Path:
        """Write the engine of the policy as it is in memory."""
        output = Path(self.options.work) / name
        board = BOARDS["rtx-5090"] if precision == "nvfp4" else boards_of("rtx")[0]
        made = plan_target(plan, self.tokens, TARGETS["rtx"], board, precision=precision)
        static = precision in STATIC
        export_tensorrt(
            source_of(self.loaded, plan), made, self._seen if static else {}, output, graphs=self.graphs, overwrite=True
        )  # fmt: skip
        return output


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


class OrtEngine:
    """The stages of an engine directory under ONNX Runtime on the CPU, without fusing optimizations.

    4-bit floats, which it does not have, become their definition: the files are rewritten.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        options = ort.SessionOptions()
        # its extended optimizations change the arithmetic: int4 weights are fused wrongly in 1.32
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.intra_op_num_threads = 1
        self._manifest = manifest
        for stage in manifest.stages:
            unfuse_file(directory / stage.file)
        self._sessions = {
            stage.name: ort.InferenceSession(directory / stage.file, options)
            for stage in manifest.stages
        }

    def chunk(self, tensors: Mapping[str, NDArray[Any]], noise: Array) -> Array:
        """Return the normalized chunk."""
        known, sampler = dict(tensors), self._manifest.sampler
        *once, repeated = self._manifest.stages
        for stage in once:
            known.update(self._run(stage.name, known))

        def velocity(x: Array, t: float) -> Array:
            step = {sampler.state: x, sampler.time: np.array([t], np.float32)}
            found: Array = self._run(repeated.name, {**known, **step})[sampler.velocity]
            return found

        return euler_integrate(velocity, noise, sampler.timesteps, sampler.step)

    def _run(self, stage: str, known: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        session = self._sessions[stage]
        names = [value.name for value in session.get_inputs()]
        outputs = [value.name for value in session.get_outputs()]
        found = session.run(outputs, {name: known[name] for name in names})
        return dict(zip(outputs, found, strict=True))


class Comparison:
    """Action errors against the float policy on held-out frames, with the same noise for everything compared."""

    def __init__(self, bench: Bench) -> None:
        self._loaded, heldout = bench.loaded, bench.calibration.part("heldout")
        count = min(bench.options.heldout, len(heldout))
        preprocess = staged.make_preprocessor(self._loaded.interface)
        self._tensors = [staged.prepare(preprocess, heldout[i].observation) for i in range(count)]
        shape = self._loaded.interface.sampler.noise_shape
        self._dim = self._loaded.interface.action.dim
        self._noises = [frame_noise(1, index, shape) for index in range(count)]
        self.exact = self.torch_chunks()

    @property
    def frames(self) -> int:
        """How many frames are compared."""
        return len(self._tensors)

    def torch_chunks(self) -> Array:
        """Return the chunks of the policy as it is in memory: (frames, 1, chunk, action)."""
        loaded = self._loaded
        return np.stack(
            [
                staged.sample(loaded, staged.run_context(loaded, t), noise)[..., : self._dim]
                for t, noise in zip(self._tensors, self._noises, strict=True)
            ]
        )

    def graph_chunks(self, engine: OrtEngine) -> Array:
        """Return an engine's chunks."""
        pairs = zip(self._tensors, self._noises, strict=True)
        return np.stack([engine.chunk(t, noise)[..., : self._dim] for t, noise in pairs])

    def error(self, found: Array) -> ActionError:
        """Return the error of chunks."""
        exact = self.exact
        frames = np.sqrt(np.square(found - exact).mean((1, 2, 3)) / np.square(exact).mean())
        rms = float(np.sqrt(np.square(frames).mean()))
        return ActionError(rms, float(np.median(frames)), float(frames.max()))


def numerics(bench: Bench) -> Numerics:
    """Return the action errors of CPU W8A8 and of the target graphs."""
    comparison = Comparison(bench)

    def graph_error(plan: Plan, precision: str, name: str) -> ActionError:
        directory = bench.export(plan, precision, name)
        engine = OrtEngine(directory, read_manifest(directory))
        return comparison.error(comparison.graph_chunks(engine))

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


def main() -> None:
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
    options = parser.parse_args()
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
