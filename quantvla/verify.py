"""`quantvla verify`: how far an engine is from the float policy, and what part of that has which cause.

- parity: float engine against lerobot's own policy; what lowering and the runtime add
- kernel: every integer kernel against the reference arithmetic on the same integers and the same
  input; what the kernels add. Own attentions against theirs, whose products may be of bfloat16
  numbers. Whole chunks are compared too, where the quantized checkpoint is given
  (its float rest may carry folds), but there a float difference of 1e-6 upstream moves some
  activations to the neighbouring int8 code, in any two correct programs (benchmarks/kernel_fidelity), so
  that the bound on chunks is a share of the quantization error, or the bound of a kernel on their relative
  RMS, or twice what the engine's own velocities change by when its inputs change in the last bits: with
  8-bit weights rounding activations is most of the quantization error, and no share of it. The reference's attention
  is float32's, so the engine's is here too; what bfloat16 products change is told beside it and is part of quantization.
- quantization: engine against the float policy; what the integers cost
- loop: the chunk as the robot gets it, all steps in one call, against the one sampled step by step, which the
  other parts look at; on the first frames

An engine for a GPU target is run by ONNX Runtime on the CPU, node by node: the numbers of its graphs, 4-bit
floats by their definition. Its kernels are TensorRT's and are not compared.

Same observations, same noise. Errors are of normalized actions (the policy's own units).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from quantvla.calib_sets import CalibrationSet, check_robot
from quantvla.calibrate import frame_noise
from quantvla.checkpoint import load_quantized, read_weights
from quantvla.export.engine import export_engine
from quantvla.export.integers import IntegerSite, integer_sites
from quantvla.export.nvfp4_unfused import unfuse_file
from quantvla.families import load_policy
from quantvla.families.base import LoadedPolicy
from quantvla.fidelity.action_error import (
    Gripper,
    action_error,
    find_gripper,
    relative_rms,
    velocity_error,
)
from quantvla.fidelity.kernels import CallErrors, kernel_errors
from quantvla.fidelity.trajectories import (
    Frame,
    Trajectory,
    engine_trajectories,
    engine_velocities,
    loop_difference,
    staged_trajectories,
)
from quantvla.float_policy import FloatPolicy
from quantvla.progress import Progress
from quantvla.runtime import kernels
from quantvla.runtime.backend import UNFUSED
from quantvla.runtime.errors import explain
from quantvla.runtime.files import sha256_file, sha256_tree
from quantvla.runtime.manifest import (
    MANIFEST_FILE,
    Manifest,
    check_files,
    encode_manifest,
    read_manifest,
)
from quantvla.runtime.policy import Policy
from quantvla.runtime.processing_steps import command_statistics
from quantvla.runtime.site_formats import read_formats
from quantvla.runtime.targets import TARGETS as GPU_TARGETS
from quantvla.schedule import resampled
from quantvla.verify_report import (
    DEFAULT_THRESHOLDS,
    KernelError,
    MaxError,
    QuantizationError,
    Thresholds,
    VerifyReport,
)
from quantvla.verify_rounding import RoundingResponse, rounding_response

Array = NDArray[np.float32]
LOOP_FRAMES = 4
"""Frames on which all steps in one call are compared with one call a step."""


def verify(
    engine: Path,
    checkpoint: Path,
    heldout: CalibrationSet,
    *,
    float_engine: Path | None = None,
    quantized: Path | None = None,
    thresholds: Thresholds = DEFAULT_THRESHOLDS,
    seed: int = 0,
    progress: Progress = lambda _what, _done, _total: None,
) -> VerifyReport:
    """Compare an engine with the checkpoint it was made from, on the frames of ``heldout``.

    ``float_engine``: a float engine of the same checkpoint for the parity part; exported to a
    temporary directory when it is needed and not given. ``quantized``: the quantized checkpoint
    the engine was exported from, for comparing whole chunks with reference arithmetic.
    """
    with ExitStack() as stack:
        manifest = read_manifest(engine)
        on_gpu = manifest.target in GPU_TARGETS
        _require_source(engine, manifest, checkpoint)
        runs = engine
        if on_gpu:
            runs = _unfused_copy(engine, manifest, Path(stack.enter_context(TemporaryDirectory())))
        policy = stack.enter_context(Policy.from_pretrained(runs))
        check_robot(heldout.robot, manifest.cameras, manifest.state, where=heldout.card.name)
        integers = list(integer_sites(engine, manifest))
        loaded = load_policy(checkpoint)
        own_times = manifest.sampler.timesteps == loaded.interface.sampler.timesteps
        if not integers and not on_gpu and own_times:
            float_engine = engine
        elif float_engine is None:
            float_engine = Path(stack.enter_context(TemporaryDirectory())) / "float"
            export_engine(checkpoint, "cpu", float_engine, progress=progress)
        frames = [frame.observation for frame in heldout]
        noises = [frame_noise(seed, i, manifest.sampler.noise_shape) for i in range(len(frames))]
        ours = engine_trajectories(policy, frames, noises, "engine", progress)
        loop = None
        if manifest.loop is not None:
            loop = loop_difference(policy, frames[:LOOP_FRAMES], noises[:LOOP_FRAMES])
        exact = _lerobot_chunks(FloatPolicy(loaded), frames, noises, progress)
        parity = MaxError(_max_abs(_float_chunks(float_engine, frames, noises, progress), exact))
        reference = resampled(loaded, manifest.sampler)
        floats = staged_trajectories(reference, frames, noises, "float policy", progress)
        schedule_nrmse = None
        if not own_times:
            found = np.stack([t.chunk for t in floats])
            schedule_nrmse = relative_rms(found, np.stack(exact), axes=(0, 1, 2))[0]
            exact = [t.chunk for t in floats]
        teacher = engine_velocities(policy, frames, floats, "engine, teacher-forced", progress)
        calls = kernel_errors(engine, policy, integers, frames, ours, progress)
        integer, noise_floor, compared = None, None, ours
        if not on_gpu and (quantized is not None or not integers):
            same = (
                reference
                if quantized is None
                else resampled(_same_integers(engine, quantized, integers), manifest.sampler)
            )
            integer = staged_trajectories(same, frames, noises, "integer reference", progress)
            with kernels.float_attention():
                if calls.attentions and kernels.BFLOAT16 in kernels.available().attention:
                    what = "engine, float32 attention"
                    compared = engine_trajectories(policy, frames, noises, what, progress)
                if integers:
                    noise_floor = rounding_response(policy, frames, integer, seed, progress)
    gripper = _gripper(heldout, manifest)
    quantization = _quantization_error(
        ours, exact, floats, teacher, manifest.action.execute, gripper
    )
    kernel = (
        KernelError(None, None, None, None)
        if on_gpu
        else _kernel_error(ours, compared, integer, calls, quantization, noise_floor)
    )
    memory = _target_memory(engine, loaded) if on_gpu else _memory(integers)
    failed = _failed(parity, loop, kernel, quantization, thresholds)
    return VerifyReport(
        passed=not failed, failed=failed, chunk_limits_kept=kernel.chunk_limits_kept(thresholds),
        parity=parity, loop=loop, kernel=kernel, quantization=quantization, thresholds=thresholds,
        frames=len(frames), set=heldout.card.name, seed=seed, integer_sites=memory[0],
        integer_bytes=memory[1], half_bytes=memory[2], schedule_nrmse=schedule_nrmse,
    )  # fmt: skip


def _memory(integers: Sequence[IntegerSite]) -> tuple[int, int, int]:
    """Return (sites, bytes, bytes in half precision) of the quantized linears."""
    stored = sum(site.stored_bytes for site in integers)
    return len(integers), stored, sum(2 * site.weight.codes.numel() for site in integers)


def _target_memory(engine: Path, loaded: LoadedPolicy) -> tuple[int, int, int]:
    formats = read_formats(engine)
    narrow = [site for site in formats.sites if site.format != formats.activations]
    sizes = {site.name: site.out_features * site.in_features for site in loaded.sites}
    return (
        len(narrow),
        sum(site.weight_bytes for site in narrow),
        sum(2 * sizes[site.site] for site in narrow),
    )


def _unfused_copy(engine: Path, manifest: Manifest, parent: Path) -> Path:
    """Return a copy of a GPU engine without its plans, which ONNX Runtime runs on the CPU as it stands."""
    check_files(engine, manifest)
    copy = parent / engine.resolve().name
    copy.mkdir()
    for name in manifest.files:
        shutil.copyfile(engine / name, copy / name)
    files = dict(manifest.files)
    for stage in manifest.stages:
        if unfuse_file(copy / stage.file):
            changed = [name for name in files if name.startswith(stage.file)]
            files |= {name: sha256_file(copy / name) for name in changed}
    runnable = msgspec.structs.replace(manifest, target=UNFUSED, files=files)
    (copy / MANIFEST_FILE).write_bytes(encode_manifest(runnable))
    return copy


def _failed(
    parity: MaxError,
    loop: float | None,
    kernel: KernelError,
    quantization: QuantizationError,
    limits: Thresholds,
) -> tuple[str, ...]:
    holds = {
        "parity": parity.max_abs <= limits.parity,
        "loop": loop is None or loop <= limits.parity,
        "kernel": kernel.max_abs is None or kernel.max_abs <= limits.kernel,
        "attention": (kernel.attention_max_abs or 0.0) <= limits.attention,
        "kernel chunks": kernel.chunk_limits_kept(limits) != (),
        "quantization": quantization.cosine_mean >= limits.cosine_mean,
    }
    return tuple(part for part, within in holds.items() if not within)


def _require_source(engine: Path, manifest: Manifest, checkpoint: Path) -> None:
    found = sha256_tree(checkpoint)
    if found != manifest.source.checkpoint_sha256:
        raise explain(
            engine,
            f"was made from another checkpoint than {checkpoint}, expected SHA-256 {found[:12]}…",
            got=f"{manifest.source.checkpoint_sha256[:12]}…",
            remedy="give the checkpoint it was made from",
        )


def _same_integers(engine: Path, quantized: Path, integers: Sequence[IntegerSite]) -> LoadedPolicy:
    """Return the quantized checkpoint's policy, after checking that the engine has its integers."""
    loaded, card = load_quantized(quantized)
    weights = read_weights(quantized, card.plan)
    found = {site.site: site.weight for site in integers}
    if found.keys() != weights.keys() or not all(
        torch.equal(weight.codes, found[site].codes) for site, weight in weights.items()
    ):
        raise explain(
            engine,
            f"has other integers than {quantized}",
            remedy="give the quantized checkpoint that the engine was exported from",
        )
    return loaded


def _gripper(heldout: CalibrationSet, manifest: Manifest) -> Gripper | None:
    """Return the gripper dimension; the set's robot knows the names that a checkpoint does not carry."""
    action = heldout.robot.action
    statistics = command_statistics(manifest.postprocess, manifest.statistics)
    return find_gripper(action.names if action else (), manifest.action, statistics)


def _float_chunks(
    engine: Path, frames: Sequence[Frame], noises: Sequence[Array], progress: Progress
) -> list[Array]:
    with Policy.from_pretrained(engine) as policy:
        return [
            trajectory.chunk
            for trajectory in engine_trajectories(policy, frames, noises, "float engine", progress)
        ]


def _lerobot_chunks(
    policy: FloatPolicy, frames: Sequence[Frame], noises: Sequence[Array], progress: Progress
) -> list[Array]:
    chunks = []
    for index, (frame, noise) in enumerate(zip(frames, noises, strict=True)):
        progress("lerobot", index, len(frames))
        chunks.append(policy.predict_normalized(frame, noise=noise))
    return chunks


def _kernel_error(
    ours: Sequence[Trajectory],
    compared: Sequence[Trajectory],
    integer: Sequence[Trajectory] | None,
    calls: CallErrors,
    quantization: QuantizationError,
    noise_floor: RoundingResponse | None,
) -> KernelError:
    attention, linears = _largest(calls.attentions), _largest(calls.linears)
    if integer is None:
        return KernelError(linears, None, None, None, attention_max_abs=attention)
    as_run, chunks, reference = (
        np.stack([t.chunk for t in found]) for found in (ours, compared, integer)
    )
    chunk_max = float(np.abs(chunks - reference).max())
    nrmse = relative_rms(chunks, reference, axes=(0, 1, 2))[0]
    return KernelError(
        max_abs=chunk_max if linears is None else linears,
        chunk_max_abs=chunk_max,
        chunk_nrmse=nrmse,
        share=nrmse / max(quantization.nrmse, 1e-12) if calls.linears else None,
        velocity_nrmse=None if noise_floor is None else noise_floor.reference_nrmse,
        rounding_nrmse=None if noise_floor is None else noise_floor.rounding_nrmse,
        attention_max_abs=attention,
        bfloat16_nrmse=relative_rms(as_run, chunks, axes=(0, 1, 2))[0] or None,
    )


def _largest(errors: Sequence[float]) -> float | None:
    """Return the largest error, NaN if one is, None of none."""
    return float(np.max(errors)) if errors else None


def _max_abs(ours: Sequence[Array], theirs: Sequence[Array]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


def _quantization_error(
    ours: Sequence[Trajectory],
    exact: Sequence[Array],
    floats: Sequence[Trajectory],
    teacher: Array,
    execute: int,
    gripper: Gripper | None,
) -> QuantizationError:
    chunks = np.stack([t.chunk for t in ours])
    error = action_error(chunks, np.stack(exact), execute=execute, gripper=gripper)
    target = np.stack([t.velocities for t in floats])
    return QuantizationError(
        **msgspec.structs.asdict(error),
        velocity_teacher_forced=velocity_error(teacher, target),
        velocity_free_running=velocity_error(np.stack([t.velocities for t in ours]), target),
    )
