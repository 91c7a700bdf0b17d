"""What each pass brings: recipes and variants of `gptq-w4a8`, paired action error on held-out frames.

    python benchmarks/method/run.py                       # all, a few hours on two cores
    python benchmarks/method/run.py rtn-w4a8 best-w4a8    # some
    python benchmarks/method/run.py --table               # the table of docs/method.md

The quantized checkpoint runs in torch, in the reference arithmetic that engines are verified against.
Results are kept in ``result.json`` beside this file, arm by arm; ``docs/method.md`` shows them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from quantvla.calib_sets import CalibrationSet, limit, open_set
from quantvla.calibrate import frame_noise
from quantvla.checkpoint import load_quantized
from quantvla.cli.progress import progress_bar
from quantvla.families import load_policy
from quantvla.families.base import LoadedPolicy
from quantvla.fidelity.action_error import action_error
from quantvla.fidelity.trajectories import staged_trajectories
from quantvla.passes import (
    BalanceOutputs,
    CorrectOutputs,
    FoldNorms,
    Gptq,
    MatchTemperature,
    Pass,
    Permute,
    Rotate,
    RoundWeights,
    Smooth,
    TuneScales,
)
from quantvla.quantize import quantize
from quantvla.recipe import Recipe, read_recipe
from quantvla.runtime.files import sha256_tree, write_atomic

HERE = Path(__file__).parent
RECIPES = (
    "rtn-w4a8", "w4a8", "layout-w4a8", "atm-w4a8", "ohb-w4a8", "transform-w4a8", "quantvla-w4a8",
    "gptq-w4a8", "best-w4a8", "all-w4a8", "smoothquant-w8a8", "awq-w4a16", "published",
)  # fmt: skip
_GPTQ = next(step for step in read_recipe("gptq-w4a8").passes if isinstance(step, Gptq))
VARIANTS: dict[str, tuple[Pass, ...]] = {
    "gptq, target = weight": (msgspec.structs.replace(_GPTQ, target="weight"),),
    "gptq, tokens = equal": (msgspec.structs.replace(_GPTQ, tokens="equal"),),
    "gptq, target = weight, tokens = equal": (
        msgspec.structs.replace(_GPTQ, target="weight", tokens="equal"),
    ),
    "gptq, dynamic = false": (msgspec.structs.replace(_GPTQ, dynamic=False),),
    "gptq, polish = 2": (msgspec.structs.replace(_GPTQ, polish=2),),
    "gptq, step = input": (msgspec.structs.replace(_GPTQ, step="input"),),
    "gptq, step = stage": (msgspec.structs.replace(_GPTQ, step="stage"),),
    "smooth + gptq": (Smooth(), _GPTQ),
    "rotate + gptq": (FoldNorms(), Rotate(), _GPTQ),
    "permute + gptq": (Permute(), _GPTQ),
    "gptq + atm + ohb": (_GPTQ, MatchTemperature(), BalanceOutputs()),
    "gptq + correct_output": (_GPTQ, CorrectOutputs()),
    "rtn + tune_scales": (RoundWeights(weighting="none", scales="largest"), TuneScales()),
}


class Arm(msgspec.Struct, frozen=True):
    """One arm: relative action error of all chunks and of the median one, what it stores, what it took, what was folded and corrected."""

    nrmse: float
    nrmse_median: float
    nrmse_per_dimension: tuple[float, ...]
    effective_bits: float
    quantize_cpu_s: float | None
    checkpoint_sha256: str
    frames: int
    heldout_frames: int
    noises: int
    factors: dict[str, tuple[tuple[float, ...], ...]] = {}
    notes: tuple[str, ...] = ()


def recipe_of(name: str) -> Recipe:
    """Return a bundled recipe, or ``gptq-w4a8`` with a variant's passes."""
    if name not in VARIANTS:
        return read_recipe(name)
    return msgspec.structs.replace(read_recipe("gptq-w4a8"), name=name, passes=VARIANTS[name])


def chunks(
    loaded: LoadedPolicy, heldout: CalibrationSet, noises: int, what: str
) -> NDArray[np.float32]:
    """Return the policy's chunks for every held-out frame and its noises: (frames * noises, horizon, dim), normalized."""
    shape = loaded.interface.sampler.noise_shape
    drawn = [frame_noise(seed, i, shape) for i in range(len(heldout)) for seed in range(noises)]
    frames = [frame.observation for frame in heldout for _ in range(noises)]
    with progress_bar() as progress:
        found = staged_trajectories(loaded, frames, drawn, what, progress)
    return np.stack([trajectory.chunk for trajectory in found])


def measure(
    name: str, policy: Path, calibration: CalibrationSet, heldout: CalibrationSet,
    reference: NDArray[np.float32], noises: int, work: Path,
) -> Arm:  # fmt: skip
    """Quantize with one recipe and compare."""
    started = time.process_time()
    output = work / name.replace(" ", "_")
    with progress_bar() as progress:
        result = quantize(
            policy, calibration, recipe_of(name), output, overwrite=True, progress=progress
        )
    took = time.process_time() - started
    found = chunks(load_quantized(output)[0], heldout, noises, name)
    error = action_error(found, reference, execute=found.shape[1])
    bits = sum(8 * entry.bytes_after for entry in result.plan.quantized)
    weights = sum(entry.out_features * entry.in_features for entry in result.plan.quantized)
    return Arm(
        nrmse=error.nrmse, nrmse_median=error.nrmse_median,
        nrmse_per_dimension=error.nrmse_per_dimension, noises=noises,
        effective_bits=bits / weights, quantize_cpu_s=round(took, 1),
        checkpoint_sha256=sha256_tree(policy), frames=len(calibration), heldout_frames=len(heldout),
        factors={
            report.kind: tuple(entry.raw for entry in report.factors)
            for report in result.reports if report.factors
        },
        notes=tuple(note for report in result.reports for note in report.notes if "warning" in note),
    )  # fmt: skip


def table(kept: dict[str, Arm]) -> str:
    """Return the results as a Markdown table, in the order of recipes and variants."""
    nearest = kept.get("rtn-w4a8")
    lines = [
        "| recipe or variant | action error | median chunk | both against rtn-w4a8 | bits a weight | frames | quantize, CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in (*RECIPES, *VARIANTS):
        if name in kept:
            arm = kept[name]
            lines.append(
                f"| {name} | {arm.nrmse:.2%} | {arm.nrmse_median:.2%} | {_ratios(arm, nearest)} | "
                f"{arm.effective_bits:.2f} | {arm.frames} | "
                f"{'-' if arm.quantize_cpu_s is None else round(arm.quantize_cpu_s)} |"
            )
    return "\n".join(lines)


def _ratios(arm: Arm, nearest: Arm | None) -> str:
    if nearest is None:
        return "-"
    return f"{arm.nrmse / nearest.nrmse:.2f} / {arm.nrmse_median / nearest.nrmse_median:.2f}"


def read_results(path: Path) -> dict[str, Arm]:
    """Return the arms measured so far."""
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Arm]) if path.is_file() else {}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the arms asked for and write them to the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("arms", nargs="*", help="recipes and variants [all]")
    parser.add_argument("--policy", type=Path, default=Path("examples/metaworld/policy"))
    parser.add_argument("--calib", type=Path, default=Path("calib_sets/metaworld"))
    parser.add_argument("--frames", type=int, default=256)
    parser.add_argument("--noises", type=int, default=4, help="chunks per held-out frame")
    parser.add_argument("--work", type=Path, default=Path("build/method"))
    parser.add_argument("-o", "--output", type=Path, default=HERE / "result.json")
    parser.add_argument("--table", action="store_true", help="print the results so far")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(read_results(options.output)))
        return
    source = limit(open_set(options.calib), frames=options.frames)
    heldout = source.part("heldout")
    reference = chunks(load_policy(options.policy), heldout, options.noises, "float policy")
    for name in options.arms or (*RECIPES, *VARIANTS):
        arm = measure(
            name, options.policy, source.part("calibration"), heldout, reference, options.noises,
            options.work,
        )  # fmt: skip
        kept = {**read_results(options.output), name: arm}
        encoded = msgspec.json.format(msgspec.json.encode(kept), indent=1)
        write_atomic(options.output, encoded + b"\n")
        print(f"{name}: action error {arm.nrmse:.2%}, {arm.effective_bits:.2f} bits a weight")


if __name__ == "__main__":
    main()
