"""What each linear runs in on a GPU board, and what that costs, before anything is built.

TensorRT has no kernel that multiplies 4-bit weights with 8-bit activations. A site whose weights are on
a 4-bit grid therefore runs either weight-only (4-bit weights in memory, fp16 arithmetic) or with its
weights widened to int8 (int8 arithmetic, twice the bytes). The roofline of the board says which is
faster: few tokens make a site memory-bound, many make it compute-bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from quantvla.plan import Plan, PlanEntry
from quantvla.runtime.errors import explain, nearest
from quantvla.runtime.targets import FORMAT_BITS, Board, Target, board_named, formats_of

ACTIVATIONS = ("fp16", "bf16")
PRECISIONS = ("auto", "float", "int8", "int4", "fp8", "nvfp4")
EMBEDDINGS = ("half", "int8", "int4")
INT4_BLOCKS = (16, 32, 64, 128)
NVFP4_BLOCK = 16
TABLE = "table"
"""What stands in the place of a linear whose outputs are known before the engine runs."""
_SCALE_BYTES = 2
_FORMATS_OF_BITS = {(4, 8): ("int4", "int8"), (4, 16): ("int4",), (8, 8): ("int8",)}


class TargetEntry(msgspec.Struct, frozen=True):
    """One site on the board. ``time_us``: roofline of one run of its stage at peak rates; no claim on latency."""

    site: str
    stage: str
    scheme: str
    format: str
    tokens: int
    half_bytes: int
    weight_bytes: int
    time_us: float
    reason: str


class TargetPlan(msgspec.Struct, frozen=True, kw_only=True):
    """All sites that inference reads, in module order; ``refused`` are those that do not get their scheme."""

    target: str
    board: str
    library: str
    activations: str
    precision: str
    embedding: str = "half"
    entries: tuple[TargetEntry, ...]

    @property
    def refused(self) -> tuple[TargetEntry, ...]:
        """Quantized sites that run in half precision because the target has nothing for their scheme."""
        return tuple(
            e for e in self.entries if e.scheme != "float" and e.format == self.activations
        )


def plan_target(
    plan: Plan,
    tokens: Mapping[str, int],
    target: Target,
    board: Board,
    *,
    activations: str = "fp16",
    precision: str = "auto",
    embedding: str = "half",
    tables: Mapping[str, int] = {},
) -> TargetPlan:
    """Return what every site of ``plan`` runs in on ``board``.

    ``embedding`` is the format of the table that token ids look up.
    ``tables``: the sites that only see the time, with the number of times; they leave the graph.

    ``precision`` other than "auto" overrides the choice for all quantized sites ("float" for half
    precision). Raises `QuantVLAError` when the board cannot run ``activations`` or ``precision``.
    """
    _require(activations, ACTIVATIONS, board)
    if precision not in PRECISIONS:
        raise explain(f"precision {precision!r}", "unknown", remedy=nearest(precision, PRECISIONS))
    if precision not in ("auto", "float"):
        _require(precision, formats_of(board.compute_capability), board)
    if embedding not in EMBEDDINGS:
        raise explain(f"embedding {embedding!r}", "unknown", remedy=nearest(embedding, EMBEDDINGS))
    if embedding != "half":
        _require(embedding, formats_of(board.compute_capability), board)
    if board.target != target.name:
        raise explain(
            f"board {board.name}",
            f"belongs to target {board.target}",
            remedy=f"choose a board of {target.name}",
        )
    entries = [
        _table(entry, tables[entry.site], board)
        if entry.site in tables
        else _entry(entry, tokens[entry.site], board, activations, precision)
        for entry in plan.entries
        if entry not in plan.dropped
    ]
    return TargetPlan(
        target=target.name, board=board.name, library=f"{target.library} {'.'.join(map(str, target.version))}",
        activations=activations, precision=precision, embedding=embedding, entries=tuple(entries),
    )  # fmt: skip


def relax(made: TargetPlan, plan: Plan, errors: Mapping[str, float]) -> TargetPlan:
    """Return ``made`` without int8 at the sites of ``errors``, for which one input scale is not enough.

    ``errors`` are the expected relative errors of their products. Weights on a 4-bit grid become
    weight-only where the format was free; the others run in half precision. ``plan`` is what ``made`` is of.
    """
    board, origin = board_named(made.board), {entry.site: entry for entry in plan.entries}

    def relaxed(old: TargetEntry) -> TargetEntry:
        if old.site not in errors:
            return old
        entry = origin[old.site]
        weight_only = made.precision == "auto" and entry.scheme.weight_bits == FORMAT_BITS["int4"]
        number_format = "int4" if weight_only and not _problem(entry, "int4") else made.activations
        why = f"one int8 scale for its input would cost {errors[old.site]:.1%} of its output"
        return _make(entry, old.tokens, board, number_format, why)

    return msgspec.structs.replace(made, entries=tuple(relaxed(entry) for entry in made.entries))


def _require(number_format: str, allowed: Sequence[str], board: Board) -> None:
    known = [name for name in allowed if name in formats_of(board.compute_capability)]
    if number_format not in known:
        raise explain(
            f"{number_format} on {board.title} (SM{board.compute_capability})",
            "TensorRT has no kernels for it",
            remedy=f"choose one of {', '.join(known)}",
        )


def _entry(
    entry: PlanEntry, tokens: int, board: Board, activations: str, precision: str
) -> TargetEntry:
    if not entry.quantized or precision == "float":
        why = entry.reason if not entry.quantized else "asked for with --precision float"
        return _make(entry, tokens, board, activations, why)
    if precision != "auto":
        problem = _problem(entry, precision)
        why = problem or f"asked for with --precision {precision}{_twice(entry, precision)}"
        return _make(entry, tokens, board, activations if problem else precision, why)
    bits = (entry.scheme.weight_bits, entry.scheme.activation_bits)
    candidates = [
        name
        for name in _FORMATS_OF_BITS.get(bits, ())
        if name in formats_of(board.compute_capability) and not _problem(entry, name)
    ]
    if not candidates:
        why = f"TensorRT has no kernel for {entry.scheme.name}: half precision"
        return _make(entry, tokens, board, activations, why)
    times = {name: _time_us(entry, tokens, board, name) for name in candidates}
    best = min(times, key=lambda name: times[name])
    return _make(entry, tokens, board, best, _why(entry, tokens, times, best))


def _table(entry: PlanEntry, times: int, board: Board) -> TargetEntry:
    row = _SCALE_BYTES * entry.out_features
    return TargetEntry(
        site=entry.site, stage=entry.stage, scheme=entry.scheme.name, format=TABLE, tokens=1,
        half_bytes=entry.bytes_before, weight_bytes=times * row,
        time_us=round(1e6 * row / (board.bandwidth_gb_s * 1e9), 3),
        reason=f"only sees the time: its outputs at the {times} times of the schedule are stored instead",
    )  # fmt: skip


def _problem(entry: PlanEntry, number_format: str) -> str:
    """Return why a site cannot have a format, "" if it can."""
    block = entry.scheme.block
    if number_format == "int4" and entry.scheme.weight_bits != FORMAT_BITS["int4"]:
        return f"int4 needs weights on a 4-bit grid, the site has {entry.scheme.weight_bits} bits"
    if number_format == "int4" and (block not in INT4_BLOCKS or entry.in_features % block):
        return f"int4 needs blocks of {' '.join(map(str, INT4_BLOCKS))}, the site has {block}"
    if number_format == "int4" and entry.in_features == block:
        # tensorrt_rtx 1.7 widens such a weight in a kernel of its own at every run
        return f"int4 needs two blocks or more, the site has one of {block}"
    if number_format == "nvfp4" and (
        entry.in_features % NVFP4_BLOCK or entry.in_features == NVFP4_BLOCK
    ):
        # tensorrt_rtx 1.7 computes a single block in half precision
        return f"nvfp4 needs two or more whole blocks of {NVFP4_BLOCK} inputs, the site has {entry.in_features}"
    if number_format in ("int8", "fp8") and (entry.in_features % 4 or entry.out_features % 4):
        return f"{number_format} products need dimensions divisible by 4"
    return ""


def _twice(entry: PlanEntry, precision: str) -> str:
    if precision == "nvfp4" and entry.scheme.weight_bits == FORMAT_BITS["nvfp4"]:
        return "; its weights, on a 4-bit grid already, are rounded a second time"
    return ""


def _why(entry: PlanEntry, tokens: int, times: Mapping[str, float], best: str) -> str:
    if len(times) == 1:
        return f"{entry.scheme.name} runs as {best}"
    bound = "memory-bound" if best == "int4" else "compute-bound"
    form = (
        "int4 weight-only" if best == "int4" else f"int8 on the {entry.scheme.weight_bits}-bit grid"
    )
    figures = ", ".join(f"{name} {time:.2f} us" for name, time in times.items())
    return f"{bound} with {tokens} tokens, so {form} (roofline {figures})"


def _make(
    entry: PlanEntry, tokens: int, board: Board, number_format: str, reason: str
) -> TargetEntry:
    return TargetEntry(
        site=entry.site, stage=entry.stage, scheme=entry.scheme.name, format=number_format, tokens=tokens,
        half_bytes=entry.bytes_before,
        weight_bytes=weight_bytes(
            number_format, entry.out_features, entry.in_features, entry.scheme.block
        ),
        time_us=round(_time_us(entry, tokens, board, number_format), 3), reason=reason,
    )  # fmt: skip


def weight_bytes(number_format: str, out_features: int, in_features: int, block: int) -> int:
    """Return the bytes of a weight in an engine: codes and scales (int4 and nvfp4 per block, int8 and fp8 per column)."""
    codes = out_features * in_features * FORMAT_BITS[number_format] // 8
    if number_format == "int4":
        return codes + out_features * (in_features // block) * _SCALE_BYTES
    if number_format == "nvfp4":
        return codes + out_features * (in_features // NVFP4_BLOCK)
    if number_format in ("int8", "fp8"):
        return codes + out_features * _SCALE_BYTES
    return codes


def _time_us(entry: PlanEntry, tokens: int, board: Board, number_format: str) -> float:
    operations = 2 * tokens * entry.in_features * entry.out_features
    stored = weight_bytes(number_format, entry.out_features, entry.in_features, entry.scheme.block)
    moved = stored + 2 * tokens * (entry.in_features + entry.out_features)
    return 1e6 * max(operations / board.peak(number_format), moved / (board.bandwidth_gb_s * 1e9))
