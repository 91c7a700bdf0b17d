"""The tables of docs/fidelity.md: what a column shows of an arm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from arm_result import ArmRecord, Bed, Compared

from quantvla.evaluate.results import TaskResult
from quantvla.fidelity.distribution import Distance

ABSENT = "-"
_MB = 1e6

Cell = Callable[[ArmRecord], str]


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


def _frames(record: ArmRecord) -> str:
    if record.quantize is None:
        return ABSENT
    words = record.quantize.command.split()
    return words[words.index("--frames") + 1]


COST_COLUMNS = (
    ("frames", _frames),
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
        ("median chunk", _error(2, lambda c: c.result and c.result.error.nrmse_median)),
        ("switched", _error(1, lambda c: c.result and c.result.error.switched)),
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


def loop_table(records: Sequence[ArmRecord], bed: str) -> str:
    """Return the table of the arms that ran on a bed, empty if none did."""
    ran = [record for record in records if bed in record.beds]
    return table(ran, loop_columns(ran, bed)) if ran else ""
