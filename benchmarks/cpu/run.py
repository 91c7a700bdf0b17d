"""Full-size SmolVLA on this machine's CPU: our engines against what else one would run, measured in turns.

    python benchmarks/cpu/run.py                                        # builds what is missing, then measures
    python benchmarks/cpu/run.py --openvino path/to/venv/bin/python     # OpenVINO arms, from their own environment
    python benchmarks/cpu/run.py --size tiny --rounds 1                 # a rehearsal in a few minutes

Random weights, two 512x512 cameras, ten steps, nothing changed between arms. Times of the engines
include preprocessing; those of the peers start from preprocessed tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from build_peers import build_dynamic_int8, build_nbits, export_straight, write_inputs
from rich.console import Console
from rich.table import Table
from roofline import ceilings, roofline

from quantvla.runtime.bench import bench
from quantvla.runtime.kernels import available
from quantvla.runtime.policy import Policy
from quantvla.testing.smolvla import FULL_SIZE, SmolVLASize, write_random_checkpoint

HERE = Path(__file__).parent
SIZES = {"full": FULL_SIZE, "tiny": SmolVLASize()}
STAGES = ("vision", "prefix", "denoise")
REFERENCE = "ONNX Runtime float32"
RECIPES = ["float", "int8", "w4a8-fast", str(HERE / "w4a8-everywhere.toml")]


@dataclass(frozen=True)
class Arm:
    """One way to run the policy: a command that prints times as JSON, or an engine of ours (no command)."""

    name: str
    directory: Path
    command: tuple[str, ...] = ()


def arms(work: Path, openvino: Path | None, recipes: list[str]) -> list[Arm]:
    """Return all arms in the order of the table."""

    def peer(python: str, library: str, *more: str) -> tuple[str, ...]:
        return (python, str(HERE / "peer.py"), "--library", library, *more)

    here = sys.executable
    torch = (here, str(HERE / "torch_peer.py"))
    found = [
        Arm("lerobot eager float32", work / "policy", torch),
        Arm("lerobot eager bfloat16", work / "policy", (*torch, "--precision", "bf16")),
        Arm(REFERENCE, work / "straight", peer(here, "onnxruntime")),
        Arm("ONNX Runtime float32, opset 23", work / "straight23", peer(here, "onnxruntime")),
        Arm("ONNX Runtime quantize_dynamic", work / "dynamic_int8", peer(here, "onnxruntime")),
        Arm("ONNX Runtime MatMulNBits 4-bit", work / "nbits", peer(here, "onnxruntime")),
    ]
    if openvino is not None:
        python = str(openvino)
        found += [
            Arm("OpenVINO float32", work / "straight", peer(python, "openvino")),
            Arm("OpenVINO bfloat16", work / "straight", peer(python, "openvino", "--precision", "bf16")),
            Arm("OpenVINO NNCF int8 + bfloat16", work / "nncf", peer(python, "openvino", "--precision", "bf16")),
        ]  # fmt: skip
    names = [Path(recipe).stem for recipe in recipes]
    return found + [Arm(f"quantvla {name}", work / "engines" / name) for name in names]


def build(work: Path, size: SmolVLASize, openvino: Path | None, recipes: list[str]) -> None:
    """Make what is missing under ``work``: checkpoint, inputs, peers' graphs, our engines."""
    policy = work / "policy"
    if not (policy / "model.safetensors").is_file():
        write_random_checkpoint(policy, size)
    if not (work / "inputs.npz").is_file():
        write_inputs(policy, work / "inputs.npz")
    for directory, opset in (("straight", 21), ("straight23", 23)):
        if not (work / directory).is_dir():
            export_straight(policy, work / directory, opset)
    if not (work / "dynamic_int8").is_dir():
        build_dynamic_int8(work / "straight", work / "dynamic_int8")
    if not (work / "nbits").is_dir():
        build_nbits(work / "straight", work / "nbits")
    if openvino is not None and not (work / "nncf").is_dir():
        command = [str(openvino), str(HERE / "openvino_int8.py"), str(work / "straight")]
        subprocess.run([*command, str(work / "inputs.npz"), str(work / "nncf")], check=True)
    for recipe in recipes:
        if not (work / "engines" / Path(recipe).stem).is_dir():
            _compile(work, policy, recipe)


def _compile(work: Path, policy: Path, recipe: str) -> None:
    source, name = policy, Path(recipe).stem
    if recipe != "float":
        source = work / name
        if not source.is_dir():
            _quantvla("quantize", "--policy.path", str(policy), "--calib", str(_set(work, policy)),
                      "--frames", "2", "--recipe", recipe, "-o", str(source))  # fmt: skip
    _quantvla("export", str(source), "-o", str(work / "engines" / name))


def _set(work: Path, policy: Path) -> Path:
    from build_peers import write_calibration_set

    if not (work / "set").is_dir():
        write_calibration_set(policy, work / "set")
    return work / "set"


def _quantvla(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "quantvla", *arguments], check=True)


def measure(arm: Arm, work: Path, repeats: int, threads: int) -> dict[str, Any]:
    """Return one arm's times, memory and chunk of this turn."""
    output = work / "chunk.npy"
    if arm.command:
        options = ["--threads", str(threads), "--repeats", str(repeats)]
        command = [
            *arm.command,
            *options,
            str(arm.directory),
            str(work / "inputs.npz"),
            str(output),
        ]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
        return {**found, "chunk": np.load(output)}
    report = bench(arm.directory, repeats=repeats, warmup=1, threads=threads)
    times = {name: [stage.p50] for name, stage in report.stages.items()}
    return {
        "times_ms": {**times, "chunk": [report.chunk_ms.p50]},
        "load_ms": report.load_ms, "first_chunk_ms": report.first_chunk_ms,
        "resident_mb": report.resident_mb, "peak_rss_mb": report.peak_rss_mb,
        "chunk": _chunk_of(arm.directory, work / "inputs.npz", threads),
    }  # fmt: skip


def _chunk_of(engine: Path, inputs: Path, threads: int) -> Any:
    with np.load(inputs) as file:
        given = dict(file)
    with Policy.from_pretrained(engine, threads=threads, verify_checksums=False) as policy:
        return policy._engine.sample(policy._engine.prepare(given), given["noise"])


def summarize(turns: dict[str, list[dict[str, Any]]], dim: int) -> dict[str, dict[str, Any]]:
    """Return medians over all turns, p99 of the chunk, ratios and errors, by arm."""
    exact = turns[REFERENCE][0]["chunk"][..., :dim]
    rows = {}
    for name, found in turns.items():
        stages = {
            f"{stage}_ms": float(np.median([t for turn in found for t in turn["times_ms"][stage]]))
            for stage in (*STAGES, "chunk")
        }
        chunks = [t for turn in found for t in turn["times_ms"]["chunk"]]
        error = found[0]["chunk"][..., :dim] - exact
        rows[name] = {
            **{key: round(value, 2) for key, value in stages.items()},
            "chunk_p99_ms": round(float(np.percentile(chunks, 99)), 2),
            "chunks_measured": len(chunks),
            "load_ms": round(float(np.median([turn["load_ms"] for turn in found])), 1),
            "resident_mb": round(float(np.median([turn["resident_mb"] for turn in found])), 1),
            "peak_rss_mb": round(float(np.median([turn["peak_rss_mb"] for turn in found])), 1),
            "error_nrmse": float(np.sqrt(np.mean(error**2) / np.mean(exact**2))),
            "error_max": float(np.abs(error).max()),
        }
    return rows


def show(rows: dict[str, dict[str, Any]], table_of: dict[str, Any]) -> None:
    """Print the latency table and the roofline."""
    console = Console(width=150)
    table = Table(title="one chunk, medians")
    for column in (
        "arm",
        "vision ms",
        "prefix ms",
        "step ms",
        "chunk ms",
        "times faster",
        "resident MiB",
        "error",
    ):
        table.add_column(column, justify="left" if column == "arm" else "right")
    slowest = max(row["chunk_ms"] for row in rows.values())
    for name, row in rows.items():
        cells = [f"{row[f'{stage}_ms']:.1f}" for stage in (*STAGES, "chunk")]
        table.add_row(name, *cells, f"{slowest / row['chunk_ms']:.2f}", f"{row['resident_mb']:.0f}", f"{row['error_nrmse']:.1e}")  # fmt: skip
    console.print(table)
    table = Table(
        title="achieved GOP/s of the fastest engine, against the ceilings of this machine's own matrix products"
    )
    for column in ("stage", "GOP", "GOP/s", "float ceiling", "int8 ceiling", "share of int8"):
        table.add_column(column, justify="right")
    for stage, entry in table_of["stages"].items():
        table.add_row(stage, f"{entry['gop']:.1f}", f"{entry['gops']:.0f}", f"{table_of['float_gops']:.0f}",
                      f"{table_of['int8_gops']:.0f}", f"{entry['gops'] / table_of['int8_gops']:.0%}")  # fmt: skip
    console.print(table)


def versions(openvino: Path | None) -> dict[str, str]:
    """Return what the figures depend on."""
    script = "from importlib.metadata import version as v; print(v('openvino'), v('nncf'))"
    peers = ["none", "none"]
    if openvino is not None:
        peers = subprocess.run(
            [openvino, "-c", script], stdout=subprocess.PIPE, text=True, check=True
        ).stdout.split()
    packages = ("quantvla", "torch", "lerobot", "onnxruntime", "numpy")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
    return {
        **{name: metadata.version(name) for name in packages},
        **dict(zip(("openvino", "nncf"), peers, strict=True)), "kernels": available().describe(),
        "cpu": next((line.split(":")[1].strip() for line in flags.splitlines() if line.startswith("model name")), platform.processor()),
        "flags": " ".join(flag for flag in wanted if f" {flag} " in flags.replace("\n", " ")),
        "cores": str(os.cpu_count()),
        "platform": platform.platform(),
    }  # fmt: skip


def _chosen(found: list[Arm], only: list[str] | None) -> list[Arm]:
    """Return the arms that were asked for, in the order of the table. Exits if one is unknown."""
    if only is None:
        return found
    if unknown := set(only) - {arm.name for arm in found}:
        sys.exit(
            f"--only: no such arm: {', '.join(sorted(unknown))}; known: {', '.join(arm.name for arm in found)}"
        )
    return [arm for arm in found if arm.name in (*only, REFERENCE)]


def main() -> None:
    """Build what is missing, measure all arms in turns, write JSON and a plot, print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="chunks a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recipes", nargs="*", default=RECIPES, help="names or .toml files")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="ARM",
        help=f"these arms, and {REFERENCE}, which errors are measured against",
    )
    parser.add_argument(
        "--openvino", type=Path, help="Python of an environment with openvino and nncf"
    )
    parser.add_argument("--work", type=Path, default=Path("build/cpu"))
    parser.add_argument("-o", "--output", type=Path, default=HERE / "result.json")
    options = parser.parse_args()
    if options.openvino is None:
        print(
            "OpenVINO arms left out: give --openvino the Python of an environment with openvino and nncf",
            file=sys.stderr,
        )
    options.work.mkdir(parents=True, exist_ok=True)
    build(options.work, SIZES[options.size], options.openvino, options.recipes)
    turns: dict[str, list[dict[str, Any]]] = {}
    chosen = _chosen(arms(options.work, options.openvino, options.recipes), options.only)
    for _ in range(options.rounds):
        for arm in chosen:
            print(arm.name, end=" ", file=sys.stderr, flush=True)
            found = measure(arm, options.work, options.repeats, options.threads)
            turns.setdefault(arm.name, []).append(found)
            print(f"{np.median(found['times_ms']['chunk']):.0f} ms", file=sys.stderr, flush=True)
    rows = summarize(turns, SIZES[options.size].action_dim)
    ours = min(
        (row for name, row in rows.items() if name.startswith("quantvla")),
        key=lambda row: row["chunk_ms"],
    )
    table_of = roofline(options.work / "straight", ours, *ceilings(options.threads))
    result = {
        "size": options.size,
        "threads": options.threads,
        "arms": rows,
        "roofline": table_of,
        "versions": versions(options.openvino),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    show(rows, table_of)


if __name__ == "__main__":
    main()
