from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from quantvla.latency_table import (
    TABLE_VERSION,
    Kernel,
    KernelTime,
    LatencyTable,
    Machine,
    TableFile,
    read_table,
)
from quantvla.mixed import profile
from quantvla.mixed.cache import cache_directory
from quantvla.mixed.profile import measure, measure_missing, this_machine
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.kernels import available

HERE = Machine("cpu", "Test CPU (1/2/3)", "onnxruntime 1.0", 1)
SMALL = [Kernel((1, 3, 64), 16, True, form) for form in ("float", "w4a8:32", "w8a8-dynamic")]


def fake_measure(kernels: Sequence[Kernel], machine: Machine, *, rounds: int) -> list[KernelTime]:
    return [KernelTime(k, {"slow": 99.0, "fast": 10.0 + len(k.format)}, rounds) for k in kernels]


def test_kernels_of_this_machine_are_measured_in_every_format() -> None:
    """Real exports and sessions; only that the numbers are possible durations is asserted."""
    here = this_machine("cpu", 1)
    times = measure(SMALL, here, rounds=3)
    assert [time.kernel for time in times] == SMALL
    assert all(0 < time.fastest_us < 1e6 and time.calls >= 3 for time in times)
    own = {"IntegerLinear"} if available().library is not None else set()
    operators = [set(time.median_us) for time in times]
    assert operators == [{"MatMul"}, own | {"MatMulNBits"}, {"DynamicQuantizeMatMul"}]
    assert "onnxruntime" in here.engine_library and here.threads == 1


def test_only_missing_kernels_are_measured_and_a_killed_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Kernel]] = []

    def recording(kernels: Sequence[Kernel], machine: Machine, *, rounds: int) -> list[KernelTime]:
        if len(seen) == 1:
            raise KeyboardInterrupt
        seen.append(list(kernels))
        return fake_measure(kernels, machine, rounds=rounds)

    file = TableFile(tmp_path, HERE)
    other = [Kernel((1, 3, 64), 32, False, "float")]
    monkeypatch.setattr(profile, "measure", recording)
    with pytest.raises(KeyboardInterrupt):
        measure_missing([*SMALL, *other], file)
    kept = file.read().lookup()
    assert len(kept) == len(seen[0]) > 0
    monkeypatch.setattr(profile, "measure", fake_measure)
    table = measure_missing([*SMALL, *other, *SMALL], file)
    assert set(table.lookup()) == {*SMALL, *other}
    assert set(table.lookup().values()) == {10.0 + len(kernel.format) for kernel in table.lookup()}
    assert len(table.times) == len(SMALL) + len(other)
    monkeypatch.setattr(profile, "measure", None)  # nothing is missing, so nothing is measured
    assert measure_missing(SMALL, file) == table


@pytest.mark.parametrize(
    "other",
    [
        msgspec.structs.replace(HERE, processor="Another CPU"),
        msgspec.structs.replace(HERE, engine_library="onnxruntime 1.1"),
        msgspec.structs.replace(HERE, threads=2),
    ],
)
def test_a_table_of_another_machine_is_never_used(
    tmp_path: Path, other: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "measure", fake_measure)
    theirs = TableFile(tmp_path, other)
    measure_missing(SMALL, theirs)
    mine = TableFile(tmp_path, HERE)
    assert mine.read().times == ()  # not found under this machine's key: measured again
    mine.path.write_bytes(theirs.path.read_bytes())  # nor when it is copied there
    with pytest.raises(
        QuantVLAError,
        match=r"measured on another machine than this one \(Test CPU .*\), got .*; measure here with",
    ):
        measure_missing(SMALL, mine)
    with pytest.raises(QuantVLAError, match="measured on another machine"):
        read_table(theirs.path, HERE)


def test_damaged_and_absent_tables(tmp_path: Path) -> None:
    file = TableFile(tmp_path, HERE)
    file.path.write_text("{")
    with pytest.raises(QuantVLAError, match="not a latency table of this version"):
        file.read()
    older = LatencyTable(version=TABLE_VERSION - 1, machine=HERE, times=())
    file.write(older)
    with pytest.raises(
        QuantVLAError, match=r"not a latency table of this version \(version \d, exp"
    ):
        file.read()
    with pytest.raises(QuantVLAError, match=r"absent\.json: no such file"):
        read_table(tmp_path / "absent.json", HERE)


def test_an_unknown_target_offers_the_known_one() -> None:
    with pytest.raises(QuantVLAError, match="target 'cpuu': unknown; did you mean 'cpu'"):
        this_machine("cpuu", None)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QUANTVLA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "quantvla"
    monkeypatch.setenv("QUANTVLA_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"
