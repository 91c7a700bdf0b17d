"""What a report contains. Its JSON is ``report.json``; every number of the HTML page is in it."""

from __future__ import annotations

import msgspec

from quantvla.evaluate.results import ArmResult, PairResult

REPORT_VERSION = 1


class ActionError(msgspec.Struct, frozen=True, kw_only=True):
    """Difference of normalized actions to the reference policy, same observations and noise.

    ``nrmse`` is the root mean square error over that of the reference's actions; the cosines are
    between whole chunks: mean, 5th percentile and worst observation. What lowering adds:
    ``lowering_max_abs``, the largest difference of an action to lerobot (float engines);
    ``kernel_max_relative``, that of an integer kernel's output to the reference arithmetic on the
    same input, over the largest output of that call (integer engines).
    """

    nrmse: float
    cosine_mean: float
    cosine_p5: float
    cosine_min: float
    observations: int
    lowering_max_abs: float | None = None
    kernel_max_relative: float | None = None


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of one call: median and 99th percentile.

    A chunk calls the stage ``repeat`` times; ``chunk_p50`` is the median of these calls' sum,
    null where only single calls were timed.
    """

    p50: float
    p99: float
    repeat: int = 1
    chunk_p50: float | None = None

    @property
    def per_chunk_ms(self) -> float:
        """The stage's share of a chunk."""
        return self.p50 * self.repeat if self.chunk_p50 is None else self.chunk_p50


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes an arm takes.

    ``quantized_parts`` are the weights, scales and zero points of the sites that the recipe
    quantizes, in the form this arm stores them; ``quantized_parts_float16`` the same sites in
    16-bit floats; ``files`` the whole directory.
    """

    quantized_parts: int
    quantized_parts_float16: int
    files: int
    resident_mb: float | None = None
    peak_rss_mb: float | None = None


class ArmReport(msgspec.Struct, frozen=True, kw_only=True):
    """One policy of the comparison. What was not measured is null."""

    name: str
    title: str
    success: ArmResult | None = None
    action_error: ActionError | None = None
    chunk_ms: Latency | None = None
    stages_ms: dict[str, Latency] = {}
    memory: Memory | None = None


class SiteError(msgspec.Struct, frozen=True, kw_only=True):
    """Quantization error of one linear: RMS of the output error over RMS of the float output."""

    site: str
    stage: str
    layer: int
    kind: str
    scheme: str
    relative_error: float


class AttentionFactors(msgspec.Struct, frozen=True, kw_only=True):
    """What a correction multiplies one attention with, per head (``atm``) or once (``ohb``).

    ``raw`` as measured, ``applied`` after the neutral band (exactly 1) and the clip at e^±``clip``.
    """

    kind: str
    site: str
    layer: int
    raw: tuple[float, ...]
    applied: tuple[float, ...]
    clip: float
    band: float


class ChunkExample(msgspec.Struct, frozen=True, kw_only=True):
    """Chunks of all arms for one held-out observation and one noise: arm -> (horizon, dim), physical units."""

    label: str
    execute: int
    action_names: tuple[str, ...]
    chunks: dict[str, tuple[tuple[float, ...], ...]]


class StepReport(msgspec.Struct, frozen=True, kw_only=True):
    """One step of the run: what it did, the command line that does the same, how long it took."""

    title: str
    command: str
    duration_s: float
    reused: bool = False


class MachineReport(msgspec.Struct, frozen=True, kw_only=True):
    """Where the numbers were measured."""

    processor: str
    cores: int
    memory_gib: float
    threads: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole report. The first arm is the reference the others are compared with."""

    title: str
    arms: tuple[ArmReport, ...]
    pairs: tuple[PairResult, ...] = ()
    tasks: tuple[str, ...] = ()
    episodes_per_task: int = 0
    seed: int = 0
    sites: tuple[SiteError, ...] = ()
    factors: tuple[AttentionFactors, ...] = ()
    examples: tuple[ChunkExample, ...] = ()
    steps: tuple[StepReport, ...] = ()
    notes: tuple[str, ...] = ()
    machine: MachineReport | None = None
    versions: dict[str, str] = {}
    schema_version: int = REPORT_VERSION
