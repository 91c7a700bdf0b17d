"""What serving an engine adds: round trips, eight clients at once, and a soak.

    python benchmarks/serve/run.py build/engines/w4a8                 # about 12 minutes, 10 of them soak
    python benchmarks/serve/run.py build/engines/w4a8 --soak 20       # a rehearsal

The server is the product's own command in a process of its own. Images are 2x 256x256 random noise, the
worst case for JPEG. Writes result.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from rich.console import Console
from rich.table import Table

from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.files import write_atomic
from quantvla.runtime.policy import Policy
from quantvla.runtime.serve.client import PolicyClient

SIDE = 256
CHUNKS, WARMUP, ROUNDS = 40, 5, 3
CLIENTS, CHUNKS_PER_CLIENT = 8, 25
MAX_WAIT_S = 60  # a loaded machine may take longer than the default 5 s for eight chunks
PARTS = ("round_trips", "together", "soak")


@dataclass(frozen=True)
class RoundTrip:
    """Milliseconds of ``chunks`` requests: the whole, and what is not the engine's part of it.

    ``added_cpu``: processor time of client and server together per request, all rounds, less that
    of a chunk in process. Unlike the others it does not grow with the load of the machine.
    """

    client: str
    chunks: int
    total_p50: float
    total_p99: float
    added_p50: float
    added_p99: float
    added_cpu: float


@dataclass(frozen=True)
class Together:
    """Several clients at once, each asking again as soon as it is answered."""

    clients: int
    chunks: int
    errors: int
    chunks_per_s: float
    total_p50: float
    total_p99: float


@dataclass(frozen=True)
class Soak:
    """Resident memory of the server (MiB), one sample per second after the first tenth of the time."""

    seconds: float
    chunks: int
    reconnects: int
    bad_requests: int
    errors: int
    first_tenth_mib: float
    last_tenth_mib: float
    growth_percent: float


@contextmanager
def server(engine: Path, threads: int) -> Iterator[tuple[int, int]]:
    """Run ``quantvla serve``; yields its process id and port."""
    options = ["--port", "0", "--threads", str(threads), "--max-wait", str(MAX_WAIT_S)]
    command = [sys.executable, "-m", "quantvla", "serve", str(engine), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r":(\d+): ready", line):
                yield process.pid, int(found[1])
                return
        raise SystemExit("the server did not start")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def observation(policy: Policy, seed: int = 0) -> dict[str, object]:
    """Return a valid observation with noise of SIDE x SIDE for images."""
    rng = np.random.default_rng(seed)
    obs = policy.blank_observation()
    for camera in policy.manifest.cameras:
        obs[camera.key] = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return obs


def in_process(engine: Path, threads: int, obs: dict[str, object]) -> tuple[float, float]:
    """Return median wall and mean processor milliseconds of a chunk in this process."""
    with Policy.from_pretrained(engine, threads=threads) as policy:
        before = time.process_time()
        times = timed(lambda: policy.predict_action_chunk(obs, seed=0))
        cpu_ms = (time.process_time() - before) * 1e3 / (CHUNKS + WARMUP)
    return median(times), cpu_ms


def cpu_ms_of(pid: int) -> float:
    """Return the processor time that this process and process ``pid`` have used."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) * 1e3 / os.sysconf("SC_CLK_TCK") + time.process_time() * 1e3


def timed(call: Callable[[], object]) -> list[float]:
    """Return the milliseconds of CHUNKS calls after WARMUP ones."""
    for _ in range(WARMUP):
        call()
    times = []
    for _ in range(CHUNKS):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return times


def round_trip(name: str, ask: Callable[[], float], pid: int, local_cpu_ms: float) -> RoundTrip:
    """Measure ``ask``, which returns the engine's milliseconds of its request."""
    engine_ms: list[float] = []
    before = cpu_ms_of(pid)
    totals = timed(lambda: engine_ms.append(ask()))
    cpu = (cpu_ms_of(pid) - before) / (CHUNKS + WARMUP) - local_cpu_ms
    added = np.subtract(totals, engine_ms[WARMUP:])
    whole = np.percentile(totals, (50, 99))
    beside = np.percentile(added, (50, 99))
    return RoundTrip(name, CHUNKS, *(round(float(v), 3) for v in (*whole, *beside, cpu)))


def ask_openpi(client: WebsocketClientPolicy, obs: dict[str, object]) -> float:
    return float(client.infer({**obs, "seed": 0})["server_timing"]["infer_ms"])


def ask_ours(client: PolicyClient, obs: dict[str, object]) -> float:
    client.predict_action_chunk(obs, seed=0)
    return client.timing["infer_ms"]


def round_trips(
    pid: int, port: int, obs: dict[str, object], local_cpu_ms: float
) -> list[RoundTrip]:
    """Measure three clients in turns; of each, returns the round with the middle p50."""
    uri = f"ws://127.0.0.1:{port}"
    openpi = WebsocketClientPolicy("127.0.0.1", port)
    with PolicyClient(uri) as raw, PolicyClient(uri, jpeg_quality=90) as jpeg:
        asks: dict[str, Callable[[], float]] = {
            "openpi-client, raw": partial(ask_openpi, openpi, obs),
            "PolicyClient, raw": partial(ask_ours, raw, obs),
            "PolicyClient, JPEG 90": partial(ask_ours, jpeg, obs),
        }
        rounds = [
            [round_trip(name, ask, pid, local_cpu_ms) for name, ask in asks.items()]
            for _ in range(ROUNDS)
        ]
    columns = [sorted(each, key=lambda r: r.added_p50) for each in zip(*rounds, strict=True)]
    return [
        replace(column[ROUNDS // 2], added_cpu=round(median(r.added_cpu for r in column), 3))
        for column in columns
    ]


def together(port: int, obs: dict[str, object]) -> Together:
    def client(number: int) -> tuple[int, list[float]]:
        errors, times = 0, []
        with PolicyClient(f"ws://127.0.0.1:{port}", timeout_s=60) as policy:
            for _ in range(CHUNKS_PER_CLIENT):
                started = time.perf_counter()
                try:
                    policy.predict_action_chunk(obs, seed=number)
                except QuantVLAError:
                    errors += 1
                times.append((time.perf_counter() - started) * 1e3)
        return errors, times

    started = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        results = list(pool.map(client, range(CLIENTS)))
    seconds = time.perf_counter() - started
    times = [t for _, ts in results for t in ts]
    p50, p99 = np.percentile(times, (50, 99))
    return Together(
        CLIENTS, len(times), sum(e for e, _ in results), round(len(times) / seconds, 2),
        round(float(p50), 2), round(float(p99), 2),
    )  # fmt: skip


def resident_mib(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]


def soak(pid: int, port: int, obs: dict[str, object], seconds: float) -> Soak:
    """Ask without pause, with a new connection every 200 chunks and a bad request every 50."""
    camera = next(key for key in obs if "image" in key)
    bad = {**obs, camera: np.zeros((3, 8, 8), np.uint8)}
    chunks = reconnects = refused = errors = 0
    samples: list[tuple[float, float]] = []
    started = time.monotonic()
    while (now := time.monotonic()) - started < seconds:
        with PolicyClient(f"ws://127.0.0.1:{port}") as policy:
            reconnects += 1
            for number in range(200):
                try:
                    policy.predict_action_chunk(bad if number % 50 == 49 else obs)
                    chunks += 1
                except QuantVLAError:
                    refused += number % 50 == 49
                    errors += number % 50 != 49
                now = time.monotonic()
                if not samples or now - samples[-1][0] >= 1:
                    samples.append((now, resident_mib(pid)))
                if now - started >= seconds:
                    break
    tenth = seconds / 10
    first = median(m for t, m in samples if tenth <= t - started < 2 * tenth)
    last = median(m for t, m in samples if t - started >= 9 * tenth)
    return Soak(
        round(now - started, 1), chunks, reconnects - 1, refused, errors,
        round(first, 1), round(last, 1), round((last / first - 1) * 100, 2),
    )  # fmt: skip


def table(trips: list[RoundTrip], in_process_p50: float) -> Table:
    shown = Table(title=f"in process p50 {in_process_p50:.2f} ms; 2x {SIDE}x{SIDE}, ms")
    for heading in ("client", "round trip p50", "p99", "added p50", "added p99", "added CPU"):
        shown.add_column(heading, justify="left" if heading == "client" else "right")
    for trip in trips:
        values = (trip.total_p50, trip.total_p99, trip.added_p50, trip.added_p99, trip.added_cpu)
        shown.add_row(trip.client, *(f"{value:.2f}" for value in values))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--soak", type=float, default=600.0, help="seconds")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="others are kept")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(__file__).with_name("result.json")
    )
    options = parser.parse_args()
    with Policy.from_pretrained(options.engine, threads=1) as policy:
        obs, manifest = observation(policy), policy.manifest
    result: dict[str, object] = {
        **(json.loads(options.output.read_text()) if options.output.is_file() else {}),
        "engine": f"{manifest.family} {manifest.recipe}",
        "threads": options.threads,
        "images": f"{len(manifest.cameras)}x {SIDE}x{SIDE}",
        "platform": platform.platform(),
        "python": platform.python_version(),
    }

    def keep(part: str, measured: object) -> None:
        """Write what is measured so far: the soak is long."""
        result[part] = {"measured": measured, "load_average": os.getloadavg()[0]}
        write_atomic(options.output, (json.dumps(result, indent=1) + "\n").encode())

    console = Console()
    local: list[tuple[float, float]] = []
    if "round_trips" in options.parts:
        local = [in_process(options.engine, options.threads, obs) for _ in range(ROUNDS)]
    with server(options.engine, options.threads) as (pid, port):
        if "round_trips" in options.parts:
            wall_ms, cpu_ms = (median(column) for column in zip(*local, strict=True))
            trips = round_trips(pid, port, obs, cpu_ms)
            keep("round_trips", [asdict(trip) for trip in trips])
            keep("in_process", {"p50": round(wall_ms, 3), "cpu": round(cpu_ms, 3)})
            console.print(table(trips, wall_ms))
        if "together" in options.parts:
            eight = together(port, obs)
            keep("together", asdict(eight))
            console.print(eight)
        if "soak" in options.parts:
            soaked = soak(pid, port, obs, options.soak)
            keep("soak", asdict(soaked))
            console.print(soaked)


if __name__ == "__main__":
    main()
