"""A run file: which engine drives which robot, how fast, and within which limits. TOML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from quantvla.runtime.control.guard import Mode
from quantvla.runtime.control.spec import CascadeSpec, StrategySpec
from quantvla.runtime.errors import explain
from quantvla.runtime.reuse import ReuseSpec

PositiveInt = Annotated[int, msgspec.Meta(gt=0)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[int, msgspec.Meta(ge=0)]
Struct = TypeVar("Struct", bound=msgspec.Struct)


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: an unknown key is an error."""


class MetaWorldSpec(_Section, frozen=True, kw_only=True, tag_field="kind", tag="metaworld"):
    """A Meta-World episode, numbered as in `quantvla eval`."""

    task: str
    seed: NotNegative = 0
    episode: NotNegative = 0


class RecordedSpec(_Section, frozen=True, kw_only=True, tag_field="kind", tag="recorded"):
    """Frames of a calibration set or a LeRobotDataset; actions go nowhere."""

    path: Path
    frames: PositiveInt = 64
    repeat: bool = True


class LeRobotSpec(_Section, frozen=True, kw_only=True, tag_field="kind", tag="lerobot"):
    """A robot class of lerobot: its ``type``, its configuration's fields, the instruction, camera keys by camera."""

    type: str
    task: str
    options: dict[str, Any] = {}
    cameras: dict[str, str] = {}


class PythonSpec(_Section, frozen=True, kw_only=True, tag_field="kind", tag="python"):
    """One's own robot: ``factory`` is ``module:callable``, called with ``options``, and returns a `Robot`."""

    factory: str
    options: dict[str, Any] = {}


RobotSpec = MetaWorldSpec | RecordedSpec | LeRobotSpec | PythonSpec


class LoopSection(_Section, frozen=True, kw_only=True):
    """Rate and observations. ``clock`` ``virtual`` lets a simulator run as fast as it can, with each
    chunk there ``delay_ticks`` after it was asked for. ``observe_every_tick`` defaults to what suits the robot.
    """

    rate_hz: PositiveFloat = 30.0
    seconds: PositiveFloat | None = None
    max_age_s: PositiveFloat = 0.5
    observe_every_tick: bool | None = None
    clock: Literal["real", "virtual"] = "real"
    delay_ticks: NotNegative = 0

    def __post_init__(self) -> None:
        """Raise ValueError for a delay that the real clock would ignore."""
        if self.delay_ticks and self.clock == "real":
            raise ValueError("`delay_ticks` is for clock 'virtual', the real one has its own delay")


class GuardSection(_Section, frozen=True, kw_only=True):
    """Limits from a file or a URDF, else from the engine's statistics. ``kill_after`` 0: never."""

    mode: Mode = "clamp"
    limits: Path | None = None
    urdf: Path | None = None
    degrees: bool = False
    kill_after: NotNegative = 100

    def __post_init__(self) -> None:
        """Raise ValueError for a unit without the file that it is the unit of."""
        if self.degrees and self.urdf is None:
            raise ValueError("`degrees` is for `urdf`, which is not given")


class WatchdogSection(_Section, frozen=True, kw_only=True):
    """See `quantvla.runtime.control.watchdog.WatchdogOptions`."""

    robot_s: PositiveFloat = 0.5
    inference_s: PositiveFloat = 5.0
    hold_s: PositiveFloat = 5.0
    heartbeat: Path | None = None


class LogSection(_Section, frozen=True, kw_only=True):
    """Where the trace goes; without it there is none. ``rerun``: the trace as a Rerun recording (.rrd) too."""

    trace: Path | None = None
    rerun: Path | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a recording without the trace that it is made from."""
        if self.rerun is not None and self.trace is None:
            raise ValueError("`rerun` is made from the trace: give `trace` too")


class RunConfig(_Section, frozen=True, kw_only=True):
    """The content of a run file. Relative paths are meant from the file's directory."""

    engine: Path
    robot: RobotSpec
    threads: PositiveInt | None = None
    seed: NotNegative = 0
    loop: LoopSection = LoopSection()
    strategy: StrategySpec = StrategySpec()
    cascade: CascadeSpec | None = None
    reuse: ReuseSpec | None = None
    guard: GuardSection = GuardSection()
    watchdog: WatchdogSection = WatchdogSection()
    log: LogSection = LogSection()


def read_run_config(path: Path) -> RunConfig:
    """Return a run file's content, its paths made absolute. Raises `QuantVLAError` naming the wrong key."""
    if not path.is_file():
        raise explain(path, "no such file", remedy="give a run file (docs/runtime.md)")
    try:
        config = msgspec.toml.decode(path.read_bytes(), type=RunConfig, dec_hook=_decode)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise explain(path, f"not a valid run file ({error})", remedy="correct that key") from error
    base = path.resolve().parent
    return msgspec.structs.replace(
        config,
        engine=base / config.engine,
        robot=_resolved(config.robot, base),
        cascade=None if config.cascade is None else _resolved(config.cascade, base),
        guard=_resolved(config.guard, base),
        watchdog=_resolved(config.watchdog, base),
        log=_resolved(config.log, base),
    )


def _decode(kind: type, value: Any) -> Any:
    """Return the path that a text names; msgspec has no paths of its own."""
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"no {kind.__name__}: {value!r}")


def _resolved(section: Struct, base: Path) -> Struct:
    """Return a section with the paths in it seen from ``base``."""
    fields = {name: getattr(section, name) for name in section.__struct_fields__}
    paths = {name: base / value for name, value in fields.items() if isinstance(value, Path)}
    return msgspec.structs.replace(section, **paths)
