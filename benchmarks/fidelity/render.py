"""docs/fidelity.md and its figures from the committed results.

    python benchmarks/fidelity/render.py

Reads results/*.json, hard_bed.json, findings.md (what a person says about the numbers) and writes
docs/fidelity.md and docs/fidelity/*.png. Nothing is measured here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
from arm_result import REFERENCE, ArmRecord, Bed, Compared, read_record
from fidelity_figures import beds_png, size_png, sweep_png
from sweep import Sweep

from quantvla.evaluate.results import TaskResult
from quantvla.fidelity.compare import Comparison, Reference
from quantvla.fidelity.distribution import Distance
from quantvla.report.comparison import comparison_png
from quantvla.runtime.errors import explain
from quantvla.runtime.files import write_atomic

HERE = Path(__file__).parent
ABSENT = "-"
_MB = 1e6
ORDER = (
    REFERENCE, "rtn-w4a8", "layout-w4a8", "transform-w4a8", "atm-w4a8", "ohb-w4a8", "quantvla-w4a8",
    "published", "w4a8", "best-w4a8", "all-w4a8", "smoothquant-w8a8", "awq-w4a16", "w4a8-vision8",
)  # fmt: skip
"""The float policy, the ablation of the published method, then the rivals; arms that are not named come last."""

Cell = Callable[[ArmRecord], str]


def read_results(directory: Path) -> list[ArmRecord]:
    """Return every arm's record in the order of the tables."""
    names = sorted((path.stem for path in directory.glob("*.json")), key=_position)
    records = [read_record(directory, name) for name in names]
    found = [record for record in records if record is not None]
    if not found or found[0].arm != REFERENCE:
        raise explain(
            directory, "holds no result of the float arm", remedy="run benchmarks/fidelity/run.py"
        )
    return found


def _position(name: str) -> tuple[int, str]:
    return (ORDER.index(name), "") if name in ORDER else (len(ORDER), name)


def comparison(records: Sequence[ArmRecord]) -> Comparison | None:
    """Return the arms' results as `quantvla compare` gives them, None without any."""
    compared = {r.arm: r.compared for r in records if r.compared is not None}
    arms = {name: c.result for name, c in compared.items() if c.result is not None}
    if not arms:
        return None
    first = next(iter(compared.values()))
    return Comparison(
        reference=Reference(
            name=REFERENCE,
            kind="engine",
            sha256=first.reference_sha256,
            smoothness=first.reference_smoothness,
        ),
        arms=arms,
        frames=first.frames,
        noises=first.noises,
        set="calib_sets/metaworld",
        set_sha256=first.set_sha256,
        seed=first.seed,
        execute=0,
        dimensions=first.dimensions,
        versions={},
    )


# ------------------------------------------------------------------------------------- tables
def table(records: Iterable[ArmRecord], columns: Sequence[tuple[str, Cell]]) -> str:
    """Return a Markdown table; columns that no arm has a value for are left out."""
    rows = list(records)
    cells = [[cell(record) for record in rows] for _, cell in columns]
    kept = [
        (title, values)
        for (title, _), values in zip(columns, cells, strict=True)
        if set(values) != {ABSENT}
    ]
    lines = ["| arm | " + " | ".join(title for title, _ in kept) + " |"]
    lines.append("|---" * (len(kept) + 1) + "|")
    for index, record in enumerate(rows):
        name = f"{record.arm} (simulated)" if record.simulated else record.arm
        lines.append(f"| {name} | " + " | ".join(values[index] for _, values in kept) + " |")
    return "\n".join(lines)


def _size(record: ArmRecord) -> str:
    if record.size is None:
        return ABSENT
    return f"{record.size.linear_bytes / _MB:.2f}"


def _bits(record: ArmRecord) -> str:
    return ABSENT if record.size is None else f"{record.size.effective_bits:.2f}"


def _sites(record: ArmRecord) -> str:
    return ABSENT if record.size is None else str(record.size.quantized_sites)


def _engine(record: ArmRecord) -> str:
    return ABSENT if record.engine_bytes is None else f"{record.engine_bytes / _MB:.1f}"


def _error(digits: int, value: Callable[[Compared], float | None]) -> Cell:
    def cell(record: ArmRecord) -> str:
        if record.compared is None or record.compared.result is None:
            return ABSENT
        found = value(record.compared)
        return ABSENT if found is None else f"{100 * found:.{digits}f} %"

    return cell


def _cosines(record: ArmRecord) -> str:
    if record.compared is None or record.compared.result is None:
        return ABSENT
    error = record.compared.result.error
    return f"{error.cosine_mean:.4f} / {error.cosine_p5:.4f} / {error.cosine_min:.4f}"


def _per_dimension(record: ArmRecord) -> str:
    if record.compared is None or record.compared.result is None:
        return ABSENT
    values = record.compared.result.error.nrmse_per_dimension
    return " / ".join(f"{100 * value:.1f}" for value in values)


def _velocity(record: ArmRecord) -> str:
    if record.compared is None or record.compared.result is None:
        return ABSENT
    found = record.compared.result
    forced, free = found.velocity_teacher_forced, found.velocity_free_running
    return f"{100 * forced[-1]:.1f} / {100 * free[-1]:.1f} %"


def _distance(name: str) -> Cell:
    def cell(record: ArmRecord) -> str:
        if record.compared is None or record.compared.result is None:
            return ABSENT
        found: Distance = getattr(record.compared.result.distribution, name)
        return f"{found.ratio:.3f} (p {found.p:.3f})"

    return cell


def _success(bed: str) -> Cell:
    def cell(record: ArmRecord) -> str:
        found = record.beds.get(bed)
        return ABSENT if found is None else format_success(found.success)

    return cell


def format_success(result: TaskResult) -> str:
    """Return ``290/306 94.8 % [91.7, 96.8]``."""
    low, high = result.ci95
    return f"{result.successes}/{result.episodes} {100 * result.rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _pair(bed: str) -> Cell:
    def cell(record: ArmRecord) -> str:
        found = record.beds.get(bed)
        if found is None or found.pair is None:
            return ABSENT
        low, high = found.pair.ci95
        return (
            f"{100 * found.pair.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}], "
            f"p {found.pair.mcnemar_p:.2f}"
        )

    return cell


def _motion(records: Sequence[ArmRecord], bed: str, field: str) -> Cell:
    """Return the cell of an arm's jerk or seam jump over the float arm's."""
    floor = _smoothness(records[0].beds.get(bed), field)

    def cell(record: ArmRecord) -> str:
        found = _smoothness(record.beds.get(bed), field)
        return ABSENT if found is None or not floor else f"{found / floor:.3f}"

    return cell


def _smoothness(bed: Bed | None, field: str) -> float | None:
    if bed is None or bed.smoothness is None:
        return None
    value = getattr(bed.smoothness, field)
    return None if value is None else float(value)


def _cost(field: str, digits: int) -> Cell:
    def cell(record: ArmRecord) -> str:
        if record.quantize is None:
            return ABSENT
        return f"{getattr(record.quantize, field):.{digits}f}"

    return cell


COST_COLUMNS = (
    ("processor s", _cost("cpu_s", 0)),
    ("peak GiB", _cost("peak_rss_gib", 2)),
)


def error_columns(dimensions: Sequence[str]) -> tuple[tuple[str, Cell], ...]:
    """Return the columns of the error table."""
    return (
        ("sites", _sites),
        ("linears MB", _size),
        ("bits", _bits),
        ("engine MB", _engine),
        ("action error", _error(2, lambda c: c.result and c.result.error.nrmse)),
        ("executed steps", _error(2, lambda c: c.result and c.result.error.nrmse_executed)),
        (f"% by dimension ({', '.join(dimensions)})", _per_dimension),
        ("cosine mean / p5 / min", _cosines),
        ("gripper flips", _error(2, lambda c: c.result and c.result.error.gripper_flips)),
        ("last velocity, forced / free", _velocity),
    )


DISTRIBUTION_COLUMNS = (
    ("energy distance", _distance("energy")),
    ("MMD", _distance("mmd")),
    ("sliced Wasserstein", _distance("sliced_wasserstein")),
)


def loop_columns(records: Sequence[ArmRecord], bed: str) -> tuple[tuple[str, Cell], ...]:
    """Return the columns of the closed-loop table of one bed."""
    return (
        ("success", _success(bed)),
        ("points to float, McNemar", _pair(bed)),
        ("jerk / float", _motion(records, bed, "jerk")),
        ("seam jump / float", _motion(records, bed, "seam")),
    )


# --------------------------------------------------------------------------------------- page
def page(
    records: Sequence[ArmRecord], sweep: Sweep | None, full: Sequence[ArmRecord], findings: str
) -> str:
    """Return the whole of docs/fidelity.md."""
    result = comparison(records)
    parts = [_INTRODUCTION, findings]
    if result is not None:
        parts.append(
            _ERRORS.format(frames=result.frames, noises=result.noises)
            + table(records, error_columns(result.dimensions))
            + _DISTRIBUTION.format(noises=result.noises)
            + table(records, DISTRIBUTION_COLUMNS)
            + "\n\n![all arms](fidelity/comparison.png)\n\n![error against bytes](fidelity/size.png)"
        )
    if any(record.beds for record in records):
        parts.append(_loop_section(records, sweep))
    parts.append(_COST + table(records, COST_COLUMNS))
    if full:
        parts.append(_FULL_COST + table(full, COST_COLUMNS))
    parts.append(_provenance(records))
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _loop_section(records: Sequence[ArmRecord], sweep: Sweep | None) -> str:
    """Return the section on closed loop; an arm is in the table of a bed that it ran on."""
    parts = [_LOOP]
    on = {bed: [r for r in records if bed in r.beds] for bed in ("reference", "hard")}
    if on["reference"]:
        parts.append("### Reference tasks")
        parts.append(table(on["reference"], loop_columns(on["reference"], "reference")))
    if sweep is not None:
        parts += ["### Harder tasks", describe_bed(sweep)]
        if on["hard"]:
            parts.append(table(on["hard"], loop_columns(on["hard"], "hard")))
        parts.append("![sweep](fidelity/sweep.png)")
    parts.append("![closed loop](fidelity/closed_loop.png)")
    return "\n\n".join(part.strip() for part in parts)


def describe_bed(sweep: Sweep) -> str:
    """Return the sentence on how the hard bed was found."""
    (name, strength), *_ = [
        *sweep.bed.perturbation.as_dict().items(),
        ("steps", sweep.bed.denoise_steps),
    ]
    return (
        f"`--perturb {name}={strength}` on {', '.join(sweep.bed.tasks)}: the largest {name} change at which "
        f"the float policy still solves {100 * sweep.master:.0f} % of the episodes of the tasks that it solves "
        f"({format_success(sweep.chosen)} on episodes that are not those below; "
        "`python benchmarks/fidelity/sweep.py`)."
    )


def _provenance(records: Sequence[ArmRecord]) -> str:
    first = records[0]
    versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    return (
        f"Policy `{first.source_sha256[:12]}`, {first.machine}; {versions}. "
        "Every number is in `benchmarks/fidelity/results/*.json`."
    )


_INTRODUCTION = """
# Fidelity: what quantization does to the actions

This page is made by `python benchmarks/fidelity/render.py` from the committed results of

    python benchmarks/fidelity/run.py --no-closed-loop    # sizes, errors, distributions
    python benchmarks/fidelity/sweep.py                   # the harder test bed
    python benchmarks/fidelity/run.py                     # closed loop, both beds

Each arm is a recipe (`quantvla/recipes/`), quantized and exported with the product's own commands; arms
marked *simulated* have no integer engine and run in PyTorch. Single arms: `quantvla compare A B ...`
for errors, `quantvla eval` for closed loop.
"""
_ERRORS = """
## Paired action error

{frames} held-out frames, {noises} noises each; both policies get the same observation and noise. The error is
the RMS difference of normalized actions over the RMS of the float policy's; *executed steps* are those run
before the next chunk. Gripper flips: executed steps on which one opens and the other closes, by commands that
differ by more than a quarter standard deviation. The last column is the velocity error at the last denoise step, on the float policy's trajectory and on the arm's own.
*linears MB*: all linears inference reads, float ones in half precision, scales counted; *bits*: per weight of the
quantized sites.

"""
_DISTRIBUTION = """

## Distribution of the actions

A policy may err on every single draw and still draw from the right distribution, or the reverse. Over {noises}
draws per frame each distance between arm and float policy is divided by the same distance between two sets of
draws of the float policy (the floor): 1 means as far apart as the float policy is from itself. The noises of arm
and floor are the same, so the ratio has little scatter. p: permutation test, draws exchanged within each
observation (`quantvla/fidelity/distribution.py` states it exactly).

"""
_LOOP = """
## Closed loop

Meta-World, the same goals and flow noise for all arms. Success with Wilson's 95 % interval; the difference to the
float engine in points with Newcombe's interval, p of McNemar's exact test on the discordant episodes. Jerk and
the jump where a new chunk begins are those of the executed actions, over the float policy's.
"""
_COST = """
## Cost of `quantvla quantize`

Processor seconds of all threads, loading PyTorch and lerobot included; wall times are in the result files.

"""
_FULL_COST = """
At full SmolVLA size (450 M parameters, random weights):

"""


def main() -> None:
    """Render the page and the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--full-size", type=Path, default=HERE / "full_size")
    parser.add_argument("--hard-bed", type=Path, default=HERE / "hard_bed.json")
    parser.add_argument("--findings", type=Path, default=HERE / "findings.md")
    parser.add_argument(
        "-o", "--output", type=Path, default=HERE.parents[1] / "docs" / "fidelity.md"
    )
    options = parser.parse_args()
    records = read_results(options.results)
    names = sorted((path.stem for path in options.full_size.glob("*.json")), key=_position)
    full = [r for r in (read_record(options.full_size, name) for name in names) if r is not None]
    sweep = None
    if options.hard_bed.is_file():
        sweep = msgspec.json.decode(options.hard_bed.read_bytes(), type=Sweep)
    findings = options.findings.read_text() if options.findings.is_file() else ""
    folder = options.output.with_suffix("")
    result = comparison(records)
    if result is not None:
        write_atomic(folder / "comparison.png", comparison_png(result))
        write_atomic(folder / "size.png", size_png(records))
    if any(record.beds for record in records):
        write_atomic(folder / "closed_loop.png", beds_png(records))
    if sweep is not None:
        write_atomic(folder / "sweep.png", sweep_png(sweep))
    write_atomic(options.output, page(records, sweep, full, findings).encode())


if __name__ == "__main__":
    main()
