"""`quantvla verify`: how far an engine is from the float policy, and what part of that has which cause.

- parity: float engine against lerobot's own policy; what lowering and the runtime add
- kernel: every integer kernel against the reference arithmetic on the same integers and the same
  input; what the kernels add. Whole chunks are compared too, but there a float difference of 1e-6
  upstream moves some activations to the neighbouring int8 code, in any two correct programs, so that
  the bound on chunks is a share of the quantization error.
- quantization: engine against the float policy; what the integers cost

Same observations, same noise. Errors are of normalized actions (the policy's own units).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from quantvla import staged
from quantvla.calib_sets import CalibrationSet, check_robot
from quantvla.calibrate import frame_noise
from quantvla.checkpoint import install_
from quantvla.export.engine import export_engine
from quantvla.export.integers import IntegerSite, integer_sites
from quantvla.export.site_values import Probe, SiteValues
from quantvla.families import load_policy
from quantvla.float_policy import FloatPolicy
from quantvla.progress import Progress
from quantvla.quantizer import QuantizedWeight, integer_linear
from quantvla.runtime.errors import explain
from quantvla.runtime.files import sha256_tree
from quantvla.runtime.manifest import Manifest
from quantvla.runtime.policy import Policy
from quantvla.runtime.sampler import Observer

Array = NDArray[np.float32]
KERNEL_FRAMES = 8  # frames on which every kernel call is compared


class Thresholds(msgspec.Struct, frozen=True):
    """What counts as passed. Cosine only catches broken engines; success in closed loop decides."""

    parity: float = 1e-4
    kernel: float = 1e-3
    kernel_share: float = 0.2
    cosine_mean: float = 0.98


DEFAULT_THRESHOLDS = Thresholds()


class MaxError(msgspec.Struct, frozen=True):
    """Largest absolute difference of a normalized action."""

    max_abs: float


class KernelError(msgspec.Struct, frozen=True):
    """Engine against reference of the same integers.

    ``max_abs``: largest difference of a kernel's output on the same input, over the largest
    magnitude of that output (of a float engine's normalized action). ``chunk_max_abs``,
    ``chunk_nrmse``: of whole normalized chunks, each program with its own roundings;
    ``share``: ``chunk_nrmse`` over the quantization error.
    """

    max_abs: float
    chunk_max_abs: float
    chunk_nrmse: float
    share: float


class QuantizationError(msgspec.Struct, frozen=True):
    """Engine against float policy.

    Cosines are of whole chunks. ``nrmse`` is the root mean square error over that of the float
    actions; per dimension in ``nrmse_per_dimension``. ``velocity_*``: relative error of the
    velocity at each denoise step, on the float policy's trajectory or on the engine's own.
    """

    cosine_mean: float
    cosine_p5: float
    cosine_min: float
    nrmse: float
    nrmse_per_dimension: tuple[float, ...]
    velocity_teacher_forced: tuple[float, ...]
    velocity_free_running: tuple[float, ...]


class VerifyReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a verification."""

    passed: bool = msgspec.field(name="pass")
    parity: MaxError
    kernel: KernelError
    quantization: QuantizationError
    thresholds: Thresholds
    frames: int
    set: str
    seed: int
    integer_sites: int
    integer_bytes: int
    half_bytes: int


@dataclass(frozen=True)
class Trajectory:
    """One chunk's denoising: states and velocities (steps, 1, horizon, padded), chunk (horizon, dim), normalized."""

    states: Array
    velocities: Array
    chunk: Array


def verify(
    engine: Path,
    checkpoint: Path,
    heldout: CalibrationSet,
    *,
    float_engine: Path | None = None,
    thresholds: Thresholds = DEFAULT_THRESHOLDS,
    seed: int = 0,
    progress: Progress = lambda _what, _done, _total: None,
) -> VerifyReport:
    """Compare an engine with the checkpoint it was made from, on the frames of ``heldout``.

    ``float_engine``: a float engine of the same checkpoint for the parity part; exported to a
    temporary directory when it is needed and not given.
    """
    with ExitStack() as stack:
        policy = stack.enter_context(Policy.from_pretrained(engine))
        manifest = policy.manifest
        _require_source(engine, manifest, checkpoint)
        check_robot(heldout.robot, manifest.cameras, manifest.state, where=heldout.card.name)
        integers = list(integer_sites(engine, manifest))
        if not integers:
            float_engine = engine
        elif float_engine is None:
            float_engine = Path(stack.enter_context(TemporaryDirectory())) / "float"
            export_engine(checkpoint, manifest.target, float_engine, progress=progress)
        frames = [frame.observation for frame in heldout]
        noises = [frame_noise(seed, i, manifest.sampler.noise_shape) for i in range(len(frames))]
        ours = _engine_trajectories(policy, frames, noises, progress)
        reference = FloatPolicy(load_policy(checkpoint))
        exact = _lerobot_chunks(reference, frames, noises, progress)
        parity = MaxError(_max_abs(_float_chunks(float_engine, frames, noises, progress), exact))
        floats = _staged_trajectories(reference, frames, noises, "float policy", progress)
        teacher = _teacher_forced(policy, frames, floats, progress)
        install_(reference.loaded.policy, {site.site: site.weight for site in integers})
        integer = _staged_trajectories(reference, frames, noises, "integer reference", progress)
        kernels = _kernel_errors(engine, policy, integers, frames, ours, progress)
    quantization = _quantization_error(ours, exact, floats, teacher)
    kernel = _kernel_error(ours, integer, kernels, quantization)
    return VerifyReport(
        passed=parity.max_abs <= thresholds.parity
        and kernel.max_abs <= thresholds.kernel
        and (not integers or kernel.share <= thresholds.kernel_share)
        and quantization.cosine_mean >= thresholds.cosine_mean,
        parity=parity, kernel=kernel, quantization=quantization, thresholds=thresholds,
        frames=len(frames), set=heldout.card.name, seed=seed, integer_sites=len(integers),
        integer_bytes=sum(site.stored_bytes for site in integers),
        half_bytes=sum(2 * site.weight.codes.numel() for site in integers),
    )  # fmt: skip


def _require_source(engine: Path, manifest: Manifest, checkpoint: Path) -> None:
    found = sha256_tree(checkpoint)
    if found != manifest.source.checkpoint_sha256:
        raise explain(
            engine,
            f"was made from another checkpoint than {checkpoint}, expected SHA-256 {found[:12]}…",
            got=f"{manifest.source.checkpoint_sha256[:12]}…",
            remedy="give the checkpoint it was made from",
        )


def _observe(policy: Policy, frame: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in frame.items() if key in policy.preprocessor.keys}


def _engine_trajectories(
    policy: Policy, frames: Sequence[dict[str, object]], noises: Sequence[Array], progress: Progress
) -> list[Trajectory]:
    dim = policy.manifest.action.dim
    found = []
    for index, (frame, noise) in enumerate(zip(frames, noises, strict=True)):
        progress("engine", index, len(frames))
        prediction = policy.predict(_observe(policy, frame), noise=noise)
        found.append(
            Trajectory(prediction.states, prediction.velocities, prediction.normalized[0, :, :dim])
        )
    return found


def _float_chunks(
    engine: Path, frames: Sequence[dict[str, object]], noises: Sequence[Array], progress: Progress
) -> list[Array]:
    with Policy.from_pretrained(engine) as policy:
        return [
            trajectory.chunk
            for trajectory in _engine_trajectories(policy, frames, noises, progress)
        ]


def _lerobot_chunks(
    policy: FloatPolicy,
    frames: Sequence[dict[str, object]],
    noises: Sequence[Array],
    progress: Progress,
) -> list[Array]:
    chunks = []
    for index, (frame, noise) in enumerate(zip(frames, noises, strict=True)):
        progress("lerobot", index, len(frames))
        chunks.append(policy.predict_normalized(frame, noise=noise))
    return chunks


def _staged_trajectories(
    policy: FloatPolicy,
    frames: Sequence[dict[str, object]],
    noises: Sequence[Array],
    what: str,
    progress: Progress,
) -> list[Trajectory]:
    loaded = policy.loaded
    preprocess = staged.make_preprocessor(loaded.interface)
    dim = loaded.interface.action.dim
    found = []
    for index, (frame, noise) in enumerate(zip(frames, noises, strict=True)):
        progress(what, index, len(frames))
        context = staged.run_context(loaded, staged.prepare(preprocess, frame))
        steps: list[tuple[Array, Array]] = []
        final = staged.sample(loaded, context, noise, _append_to(steps))
        states, velocities = (np.stack(column) for column in zip(*steps, strict=True))
        found.append(Trajectory(states, velocities, final[0, :, :dim]))
    return found


def _append_to(steps: list[tuple[Array, Array]]) -> Observer:
    return lambda x, v: steps.append((x, v))


def _teacher_forced(
    policy: Policy,
    frames: Sequence[dict[str, object]],
    floats: Sequence[Trajectory],
    progress: Progress,
) -> list[Array]:
    """Return the engine's velocities at the float policy's states."""
    times = policy.manifest.sampler.timesteps
    found = []
    for index, (frame, trajectory) in enumerate(zip(frames, floats, strict=True)):
        progress("engine, teacher-forced", index, len(frames))
        tensors = policy.prepare(_observe(policy, frame))
        found.append(
            np.stack(
                [
                    policy.velocity(tensors, x, t)
                    for x, t in zip(trajectory.states, times, strict=True)
                ]
            )
        )
    return found


def _kernel_errors(
    engine: Path,
    policy: Policy,
    integers: Sequence[IntegerSite],
    frames: Sequence[dict[str, object]],
    ours: Sequence[Trajectory],
    progress: Progress,
) -> list[float]:
    """Return the relative error of every kernel call on the first frames, on the engine's own inputs."""
    sampler, weights = policy.manifest.sampler, {site.site: site.weight for site in integers}
    probes = [Probe(engine, stage) for stage in policy.manifest.stages] if integers else []
    errors = []
    for index, frame in enumerate(frames[:KERNEL_FRAMES] if integers else ()):
        progress("kernels", index, min(KERNEL_FRAMES, len(frames)))
        known = {
            **policy.preprocessor(_observe(policy, frame)),
            **policy.prepare(_observe(policy, frame)),
        }
        for x, t in zip(ours[index].states, sampler.timesteps, strict=True):
            known |= {sampler.state: x, sampler.time: np.array([t], np.float32)}
            for stage, probe in zip(policy.manifest.stages, probes, strict=True):
                if stage.name == sampler.stage or t == sampler.timesteps[0]:
                    errors += [_kernel_difference(v, weights[v.site]) for v in probe(known)]
    return errors


def _kernel_difference(values: SiteValues, weight: QuantizedWeight) -> float:
    expected = integer_linear(torch.from_numpy(values.x), weight).numpy()
    return float(np.abs(values.y - expected).max() / max(float(np.abs(expected).max()), 1e-12))


def _kernel_error(
    ours: Sequence[Trajectory],
    integer: Sequence[Trajectory],
    kernels: Sequence[float],
    quantization: QuantizationError,
) -> KernelError:
    chunks, reference = np.stack([t.chunk for t in ours]), np.stack([t.chunk for t in integer])
    chunk_max = float(np.abs(chunks - reference).max())
    nrmse = _relative_rms(chunks, reference, axes=(0, 1, 2))[0]
    return KernelError(
        max_abs=max(kernels, default=chunk_max),
        chunk_max_abs=chunk_max,
        chunk_nrmse=nrmse,
        share=nrmse / max(quantization.nrmse, 1e-12),
    )


def _max_abs(ours: Sequence[Array], theirs: Sequence[Array]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


def _quantization_error(
    ours: Sequence[Trajectory],
    exact: Sequence[Array],
    floats: Sequence[Trajectory],
    teacher: Sequence[Array],
) -> QuantizationError:
    chunks, reference = np.stack([t.chunk for t in ours]), np.stack(exact)
    flat, flat_reference = (x.reshape(len(x), -1).astype(np.float64) for x in (chunks, reference))
    norms = np.linalg.norm(flat, axis=1) * np.linalg.norm(flat_reference, axis=1)
    cosine = (flat * flat_reference).sum(1) / np.maximum(norms, 1e-12)
    target = np.stack([t.velocities for t in floats])
    return QuantizationError(
        cosine_mean=float(cosine.mean()),
        cosine_p5=float(np.percentile(cosine, 5)),
        cosine_min=float(cosine.min()),
        nrmse=_relative_rms(chunks, reference, axes=(0, 1, 2))[0],
        nrmse_per_dimension=_relative_rms(chunks, reference, axes=(0, 1)),
        velocity_teacher_forced=_relative_rms(np.stack(teacher), target, axes=(0, 2, 3, 4)),
        velocity_free_running=_relative_rms(
            np.stack([t.velocities for t in ours]), target, axes=(0, 2, 3, 4)
        ),
    )


def _relative_rms(found: Array, reference: Array, *, axes: tuple[int, ...]) -> tuple[float, ...]:
    """Return the RMS error over the RMS of the reference, with ``axes`` averaged out."""
    error = np.square(found.astype(np.float64) - reference).mean(axes)
    scale = np.square(reference.astype(np.float64)).mean(axes)
    return tuple(np.atleast_1d(np.sqrt(error / np.maximum(scale, 1e-12))).tolist())
