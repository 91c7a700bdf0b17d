"""`quantvla profile`: measure the kernels of a policy's linears on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from quantvla.export.engine import OWN_KERNELS, TARGETS, write_stage
from quantvla.export.graphs import export_graph
from quantvla.export.kernel_choice import exact_operators
from quantvla.export.kernels import INTEGER_LINEAR
from quantvla.export.stages import StageGraph
from quantvla.families.base import Stage
from quantvla.latency_table import Kernel, KernelTime, LatencyTable, Machine, TableFile
from quantvla.mixed.offers import parse_formats
from quantvla.progress import Progress
from quantvla.quantized_linear import QuantizedLinear
from quantvla.quantizer import QuantizedWeight
from quantvla.runtime.backend import backend_for
from quantvla.runtime.errors import explain, nearest
from quantvla.runtime.kernels import available
from quantvla.runtime.machine import physical_cores, processor
from quantvla.runtime.manifest import TensorSpec
from quantvla.schemes import FLOAT, Scheme, resolve_scheme

ROUNDS = 25
WARMUP_CALLS = 5
SAMPLE_S = 1e-3  # calls are timed in batches this long, far above the clock's resolution
_MOST_CALLS = 2000
FLOAT_OPERATOR = "MatMul"

Call = Callable[[], None]


def this_machine(target: str, threads: int | None) -> Machine:
    """Return the machine that a profile made now belongs to."""
    if target not in TARGETS:
        raise explain(f"target {target!r}", "unknown", remedy=nearest(target, TARGETS))
    library = " ".join(f"{k} {v}" for k, v in sorted(backend_for(target).versions().items()))
    return Machine(target, processor(), library, physical_cores() if threads is None else threads)


def measure_missing(
    kernels: Sequence[Kernel],
    file: TableFile,
    *,
    rounds: int = ROUNDS,
    progress: Progress = lambda _what, _done, _total: None,
) -> LatencyTable:
    """Return the machine's table with all ``kernels`` in it; those it lacks are measured.

    The formats of one linear are timed in turns, so that a change of the machine's speed meets all
    of them; the table is written after each linear, so that a killed run continues.
    """
    table = file.read()
    missing = sorted(table.missing(kernels), key=_linear)
    done = 0
    for _, group in groupby(missing, key=_linear):
        members = list(group)
        progress("measuring kernels", done, len(missing))
        table = table.with_times(measure(members, file.machine, rounds=rounds))
        file.write(table)
        done += len(members)
    progress("measuring kernels", len(missing), len(missing))
    return table


def measure(kernels: Sequence[Kernel], machine: Machine, *, rounds: int) -> list[KernelTime]:
    """Return the median duration of each kernel with every operator that computes its format.

    Over ``rounds`` turns, an empty call taken off. Own operators are left out where they do not load.
    """
    ways = [(kernel, operator) for kernel in kernels for operator in _operators(kernel, machine)]
    with TemporaryDirectory() as work, ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(0)
        empty = _session(nn.ReLU(), (1,), (1,), machine, Path(work) / "empty")
        calls = [empty]
        for index, (kernel, operator) in enumerate(ways):
            calls.append(_kernel(kernel, operator, machine, Path(work) / str(index)))
        counts = [_calls_per_sample(call) for call in calls]
        samples: list[list[float]] = [[] for _ in calls]
        for _ in range(rounds):
            for call, count, found in zip(calls, counts, samples, strict=True):
                found.append(_duration_s(call, count) / count)
    overhead, *medians = (median(found) * 1e6 for found in samples)
    times: dict[Kernel, dict[str, float]] = {kernel: {} for kernel in kernels}
    for (kernel, operator), duration_us in zip(ways, medians, strict=True):
        times[kernel][operator] = round(max(duration_us - overhead, 0.01), 2)
    called = {kernel: rounds * count for (kernel, _), count in zip(ways, counts[1:], strict=True)}
    return [
        KernelTime(kernel, by_operator, called[kernel]) for kernel, by_operator in times.items()
    ]


def _linear(kernel: Kernel) -> tuple[tuple[int, ...], int, bool]:
    return kernel.shape, kernel.out_features, kernel.bias


def _calls_per_sample(call: Call) -> int:
    for _ in range(WARMUP_CALLS):
        call()
    once = min(_duration_s(call, 1) for _ in range(WARMUP_CALLS))
    return int(min(max(SAMPLE_S / max(once, 1e-9), 1), _MOST_CALLS))


def _duration_s(call: Call, count: int) -> float:
    start_ns = time.perf_counter_ns()
    for _ in range(count):
        call()
    return (time.perf_counter_ns() - start_ns) / 1e9


def _scheme(kernel: Kernel) -> Scheme:
    (form,) = parse_formats([kernel.format])
    columns = kernel.shape[-1]
    return resolve_scheme(form.scheme, (form.block,), site=kernel.describe(), in_features=columns)


def _operators(kernel: Kernel, machine: Machine) -> tuple[str, ...]:
    scheme = _scheme(kernel)
    if scheme == FLOAT:
        return (FLOAT_OPERATOR,)
    own = machine.target in OWN_KERNELS and available().library is not None
    return exact_operators(
        scheme.weight_bits, scheme.inputs, scheme.block, kernel.out_features, own=own
    )


def _kernel(kernel: Kernel, operator: str, machine: Machine, directory: Path) -> Call:
    scheme = _scheme(kernel)
    module = _module(kernel, scheme, machine.target)
    output = (*kernel.shape[:-1], kernel.out_features)
    block = scheme.block if operator == INTEGER_LINEAR.operator else 0
    return _session(module, kernel.shape, output, machine, directory, block)


def _module(kernel: Kernel, scheme: Scheme, target: str) -> nn.Module:
    rows, columns = kernel.out_features, kernel.shape[-1]
    if scheme == FLOAT:
        return nn.Linear(columns, rows, bias=kernel.bias).eval()
    high = 2 ** (scheme.weight_bits - 1)
    codes = torch.randint(-high + 1, high, (rows, columns), dtype=torch.int8)
    scales = torch.full((rows, columns // scheme.block), 2.0**-8, dtype=torch.float16)
    bias: Tensor | None = torch.randn(rows) if kernel.bias else None
    weight = QuantizedWeight(codes, scales, scheme.weight_bits, scheme.block, scheme.inputs)
    return TARGETS[target](kernel.describe(), QuantizedLinear(weight, bias))


def _session(
    module: nn.Module,
    shape: tuple[int, ...],
    output: tuple[int, ...],
    machine: Machine,
    directory: Path,
    block: int = 0,
) -> Call:
    """Return a call of the module as the engine would run it: the same export, the same session.

    ``block`` is that of the scheme where the own operator is to run, 0 where the engine library's is.
    """
    x = TensorSpec(name="x", dtype="float32", shape=shape)
    y = TensorSpec(name="y", dtype="float32", shape=output)
    graph = StageGraph("kernel", 1, export_graph(Stage("kernel", module, (x,), (y,))), {})
    directory.mkdir()
    blocks = {"qweight": block} if block else None
    spec = write_stage(directory, graph, blocks)
    session = backend_for(machine.target).load(directory / spec.file, spec, machine.threads)
    tensors = {"x": np.random.default_rng(0).standard_normal(shape, np.float32)}

    def call() -> None:
        session.run(tensors)

    return call
