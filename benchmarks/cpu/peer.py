"""Time one set of stage graphs with ONNX Runtime or OpenVINO, and write what they compute.

    python benchmarks/cpu/peer.py DIRECTORY INPUTS.npz OUTPUT.npy --library onnxruntime
    python benchmarks/cpu/peer.py DIRECTORY INPUTS.npz OUTPUT.npy --library openvino --precision bf16

Needs numpy and the library only, so that each library can have its own environment. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

STAGES = ("vision", "prefix", "denoise")
Run = Callable[[dict[str, Any]], dict[str, Any]]


def onnxruntime_stage(path: Path, threads: int, _precision: str) -> Run:
    """Return a function that runs a graph with ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]

    def run(known: dict[str, Any]) -> dict[str, Any]:
        values = session.run(outputs, {name: known[name] for name in inputs})
        return dict(zip(outputs, values, strict=True))

    return run


def openvino_stage(path: Path, threads: int, precision: str) -> Run:
    """Return a function that runs a graph with OpenVINO, its tensors shared and not copied."""
    import openvino

    compiled = openvino.Core().compile_model(
        path, "CPU",
        {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"},
    )  # fmt: skip
    request = compiled.create_infer_request()
    names = [port.get_any_name() for port in compiled.inputs]
    outputs = [port.get_any_name() for port in compiled.outputs]

    def run(known: dict[str, Any]) -> dict[str, Any]:
        values = request.infer({name: known[name] for name in names}, share_inputs=True)
        return {name: np.array(values[index]) for index, name in enumerate(outputs)}

    return run


def chunk(stages: dict[str, Run], given: dict[str, Any], times: dict[str, list[float]]) -> Any:
    """Return the normalized chunk; the milliseconds of every stage's run go to ``times``."""

    def timed(name: str, known: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        found = stages[name](known)
        times.setdefault(name, []).append((time.perf_counter() - start) * 1e3)
        return found

    start = time.perf_counter()
    known = dict(given)
    for name in STAGES[:2]:
        known |= timed(name, known)
    x, step = given["noise"], np.float32(given["step"])
    for t in given["timesteps"]:
        known |= {"x": x, "timestep": np.array([t], np.float32)}
        x = x + step * timed("denoise", known)["velocity"]
    times.setdefault("chunk", []).append((time.perf_counter() - start) * 1e3)
    return x


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the options that all peers share."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("directory", type=Path)
    found.add_argument("inputs", type=Path)
    found.add_argument("output", type=Path)
    found.add_argument("--precision", choices=("f32", "bf16"), default="f32")
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--repeats", type=int, default=3)
    return found


def measure(options: argparse.Namespace, load: Callable[[], dict[str, Run]]) -> None:
    """Load, warm up, measure, print."""
    with np.load(options.inputs) as file:
        given = dict(file)
    start = time.perf_counter()
    stages = load()
    load_ms = (time.perf_counter() - start) * 1e3
    np.save(options.output, chunk(stages, given, {}))
    times: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        chunk(stages, given, times)
    status = Path("/proc/self/status").read_text()
    resident = next(
        int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")
    )
    print(json.dumps({
        "times_ms": times, "load_ms": load_ms, "resident_mb": resident / 1024,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }))  # fmt: skip


def main() -> None:
    """Measure graphs with the library asked for."""
    found = parser(__doc__)
    found.add_argument("--library", choices=("onnxruntime", "openvino"), required=True)
    options = found.parse_args()
    load = openvino_stage if options.library == "openvino" else onnxruntime_stage
    suffix = "xml" if (options.directory / "vision.xml").is_file() else "onnx"
    measure(options, lambda: {
        name: load(options.directory / f"{name}.{suffix}", options.threads, options.precision)
        for name in STAGES
    })  # fmt: skip


if __name__ == "__main__":
    main()
