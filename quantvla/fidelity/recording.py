"""What an arm does on every frame, kept on disk frame by frame, so that a killed comparison resumes.

For each frame one NPZ file: the chunks of the shared noises, for the reference those of its own
second set of noises too, and for the first shared noise the velocity at every denoise step.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.util import Finalize
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantvla.evaluate.arms import Arm
from quantvla.fidelity.samplers import ChunkSampler, Tensors, open_sampler, sample
from quantvla.progress import Progress
from quantvla.runtime.files import write_atomic

Array = NDArray[np.float32]
FORMAT = 1
_SHARED, _OWN = 0, 1


@dataclass(frozen=True)
class Draws:
    """One frame of one arm. chunks: (noises, horizon, dim) of the shared noises; own: the same of the
    reference's second set (empty for other arms); states, velocities: (steps, 1, horizon, padded) of the
    first shared noise; forced: velocities at the reference's states (empty for the reference).
    """

    chunks: Array
    own: Array
    states: Array
    velocities: Array
    forced: Array


@dataclass(frozen=True)
class Task:
    """One frame to be sampled by one arm; pickled to worker processes."""

    arm: Arm
    index: int
    frame: dict[str, object]
    seed: int
    noises: int
    output: Path
    reference: Path | None
    threads: int


def shared_noises(seed: int, frame: int, count: int, shape: Sequence[int]) -> Array:
    """Return the noises all arms share on a frame, (count, 1, horizon, padded); the first is `frame_noise`."""
    return np.random.default_rng((seed, frame)).standard_normal((count, *shape), np.float32)


def own_noises(seed: int, frame: int, count: int, shape: Sequence[int]) -> Array:
    """Return the reference's second set of noises, independent of the shared ones."""
    return np.random.default_rng((seed, frame, _OWN)).standard_normal((count, *shape), np.float32)


def recording_directory(work: Path, arm: Arm, *parts: object) -> Path:
    """Return where the recording of an arm is kept: named by the arm's content and all else it depends on."""
    key = hashlib.sha256(repr((FORMAT, arm.sha256, *parts)).encode()).hexdigest()
    return work / f"{arm.name}-{key[:16]}"


def record(tasks: Sequence[Task], *, processes: int, what: str, progress: Progress) -> None:
    """Run the tasks whose output is missing, in ``processes`` processes."""
    missing = [task for task in tasks if not task.output.is_file()]
    done = len(tasks) - len(missing)
    for _ in _run(missing, processes):
        done += 1
        progress(what, done, len(tasks))


def read_draws(path: Path) -> Draws:
    """Return a recorded frame."""
    with np.load(path, allow_pickle=False) as stored:
        return Draws(**{name: stored[name] for name in Draws.__dataclass_fields__})


def _run(tasks: Sequence[Task], processes: int) -> Iterator[None]:
    if processes == 1 or len(tasks) < 2:
        with ExitStack() as stack:
            opened: ChunkSampler | None = None
            for task in tasks:
                opened = opened or stack.enter_context(open_sampler(task.arm, threads=task.threads))
                _write(task, opened)
                yield
        return
    # spawned, not forked: torch and ONNX Runtime have threads by now
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_work, task) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
                yield
        finally:
            pool.shutdown(cancel_futures=True)


_open: dict[str, ChunkSampler] = {}
"""In a worker process: the arm it has loaded. It ends with the process."""
_stack = ExitStack()


def _work(task: Task) -> None:
    if not _open:
        Finalize(None, _stack.close, exitpriority=0)  # before the interpreter goes
    if task.arm.path not in _open:
        _open[task.arm.path] = _stack.enter_context(open_sampler(task.arm, threads=task.threads))
    _write(task, _open[task.arm.path])


def _write(task: Task, policy: ChunkSampler) -> None:
    reference = None if task.reference is None else read_draws(task.reference)
    draws = draw(policy, task.frame, task.index, task.seed, task.noises, reference)
    stream = io.BytesIO()
    np.savez(stream, **vars(draws))
    write_atomic(task.output, stream.getvalue())


def draw(
    policy: ChunkSampler,
    frame: dict[str, object],
    index: int,
    seed: int,
    noises: int,
    reference: Draws | None,
) -> Draws:
    """Return what a policy does on one frame; ``reference`` None: this is the reference."""
    shape = policy.description.sampler.noise_shape
    context = policy.prepare(frame)
    steps: list[tuple[Array, Array]] = []
    first, *rest = shared_noises(seed, index, noises, shape)
    chunks = [sample(policy, context, first, lambda x, v: steps.append((x, v)))]
    chunks += [sample(policy, context, noise) for noise in rest]
    own: list[Array] = []
    forced: list[Array] = []
    if reference is None:
        own = [sample(policy, context, x) for x in own_noises(seed, index, noises, shape)]
    else:
        forced = _teacher_forced(policy, context, reference.states)
    states, velocities = (np.stack(column) for column in zip(*steps, strict=True))
    return Draws(
        chunks=np.stack(chunks),
        own=np.array(own, np.float32),
        states=states,
        velocities=velocities,
        forced=np.array(forced, np.float32),
    )


def _teacher_forced(policy: ChunkSampler, context: Tensors, states: Array) -> list[Array]:
    times = policy.description.sampler.timesteps
    return [policy.velocity(context, x, t) for x, t in zip(states, times, strict=True)]
