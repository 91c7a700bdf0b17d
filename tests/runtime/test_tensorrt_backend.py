"""Running plans: order of calls, sizes, lifetimes and numbers, on a device that needs no GPU."""

from __future__ import annotations

from pathlib import Path

import fake_gpu
import msgspec
import numpy as np
import pytest
import trt_engine

from quantvla.runtime import backend as backends
from quantvla.runtime.cuda_device import CudaDevice
from quantvla.runtime.engine import Engine
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.files import sha256_file, write_atomic
from quantvla.runtime.gpu import find_gpu
from quantvla.runtime.manifest import Manifest, read_manifest
from quantvla.runtime.sampler import euler_integrate
from quantvla.runtime.targets import FORMATS, TARGETS
from quantvla.runtime.tensorrt_backend import TensorRTBackend
from quantvla.runtime.tensorrt_plans import (
    SCHEMA_VERSION,
    BuildRecord,
    Machine,
    StagePlan,
    any_gpu,
    plan_directory,
    source_sha256,
    write_record,
)

HERE = Machine("tensorrt_rtx", "1.7.0", 89, any_gpu(89))
CONTEXT = 0.25


def velocity(x: np.ndarray, keys: np.ndarray, t: float) -> np.ndarray:
    return (0.5 * x + keys.astype(np.float32) + np.float32(t)).astype(np.float32)


def denoise(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    v = velocity(tensors["x"], tensors["keys"], tensors["t"][0])
    return {"v": v, "x_next": tensors["x"] + np.float32(-1 / trt_engine.STEPS) * v}


COMPUTE = {
    "vision": lambda tensors: {"features": 2 * tensors["image"]},
    "prefix": lambda tensors: {"keys": (tensors["features"] + CONTEXT).astype(np.float16)},
    "denoise": denoise,
}


def write_plans(engine: Path, machine: Machine = HERE) -> None:
    manifest, record = (
        read_manifest(engine),
        BuildRecord(schema_version=SCHEMA_VERSION, machine=machine),
    )
    for stage in manifest.stages:
        path = plan_directory(engine, machine) / f"{stage.name}.plan"
        write_atomic(path, stage.name.encode())
        plan = StagePlan(
            stage=stage.name, source_sha256=source_sha256(engine, manifest.files, stage.file),
            plan_sha256=sha256_file(path), plan_bytes=1, build_s=0.0, options="", account="", layers={},
            sites=(), warnings=(),
        )  # fmt: skip
        record = record.with_stage(plan)
    write_record(engine, record)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    engine = trt_engine.write_trt_engine(tmp_path / "engine")
    write_plans(engine)
    return engine


@pytest.fixture
def device() -> fake_gpu.FakeDevice:
    return fake_gpu.FakeDevice()


@pytest.fixture
def backend(
    device: fake_gpu.FakeDevice, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> TensorRTBackend:
    library = fake_gpu.fake_library(device, read_manifest(directory), COMPUTE)
    made = TensorRTBackend(
        "tensorrt_rtx", lambda: device, lambda: fake_gpu.GPU, lambda _name: library
    )
    monkeypatch.setattr(backends, "BACKENDS", {"rtx": made})
    return made


@pytest.fixture
def manifest(directory: Path) -> Manifest:
    return read_manifest(directory)


def expected_chunk(image: np.ndarray, noise: np.ndarray, manifest: Manifest) -> np.ndarray:
    keys = (2 * image + CONTEXT).astype(np.float16)
    sampler = manifest.sampler
    return euler_integrate(
        lambda x, t: velocity(x, keys, t), noise, sampler.timesteps, sampler.step
    )


def test_chunks_on_the_device_are_those_of_the_host_loop(
    backend: TensorRTBackend, device: fake_gpu.FakeDevice, directory: Path, manifest: Manifest
) -> None:
    engine = Engine(directory, manifest)
    rng = np.random.default_rng(0)
    for _ in range(4):  # directly, captured, launched, launched
        image = rng.standard_normal(manifest.stages[0].inputs[0].shape).astype(np.float32)
        noise = rng.standard_normal(manifest.sampler.noise_shape).astype(np.float32)
        tensors = engine.prepare({"image": image})
        chunk = engine.sample(tensors, noise)
        np.testing.assert_allclose(chunk, expected_chunk(image, noise, manifest), atol=1e-6)
        watched = engine.sample(tensors, noise, lambda _x, _v: None)
        np.testing.assert_allclose(watched, chunk, atol=1e-6)
    assert device.calls.count("begin_capture") == device.calls.count("end_capture") == 1
    engine.close()
    engine.close()
    assert device.leaked == 0


def test_after_the_capture_a_chunk_is_copies_one_launch_and_one_wait(
    backend: TensorRTBackend, device: fake_gpu.FakeDevice, directory: Path, manifest: Manifest
) -> None:
    engine = Engine(directory, manifest)
    image = np.ones(manifest.stages[0].inputs[0].shape, np.float32)
    noise = np.ones(manifest.sampler.noise_shape, np.float32)
    tensors = engine.prepare({"image": image})
    for _ in range(3):
        device.calls.clear()
        engine.sample(tensors, noise)
    assert device.calls == ["copy_in", "copy_in", "launch", "copy_out", "synchronize"]
    engine.close()


def test_a_stage_is_sent_run_fetched_and_waited_for_in_order(
    backend: TensorRTBackend, device: fake_gpu.FakeDevice, directory: Path, manifest: Manifest
) -> None:
    stage = manifest.stages[-1]
    session = backend.load(directory / stage.file, stage, 1)
    assert device.calls.count("allocate") == len(stage.inputs) + len(stage.outputs)
    device.calls.clear()
    zeros = {s.name: np.zeros(s.shape, s.dtype) for s in stage.inputs}
    first = session.run(zeros)
    assert device.calls == [*["copy_in"] * 3, "execute", "copy_out", "copy_out", "synchronize"]
    kept = first["v"].copy()
    session.run({**zeros, "t": np.ones(1, np.float32)})
    np.testing.assert_array_equal(first["v"], kept)  # results are the caller's own
    session.close()
    assert device.leaked == 0


def test_memory_is_freed_only_after_the_device_is_done(
    backend: TensorRTBackend, device: fake_gpu.FakeDevice, directory: Path, manifest: Manifest
) -> None:
    stage = manifest.stages[-1]
    session = backend.load(directory / stage.file, stage, 1)
    noise = np.zeros(manifest.sampler.noise_shape, np.float32)
    for _ in range(2):
        session.sample({"keys": np.zeros(noise.shape, np.float16)}, noise, manifest.sampler)
    device.calls.clear()
    session.close()
    assert device.calls[0] == "synchronize" and device.calls[-1] == "destroy_stream"
    assert device.calls.index("destroy_graph") < device.calls.index("free")


def test_timing_of_the_loop_adds_up_to_steps(
    backend: TensorRTBackend, directory: Path, manifest: Manifest
) -> None:
    engine = Engine(directory, manifest)
    tensors = engine.prepare({"image": np.ones(manifest.stages[0].inputs[0].shape, np.float32)})
    with engine.timing() as durations:
        engine.sample(tensors, np.ones(manifest.sampler.noise_shape, np.float32))
    assert len(durations["denoise"]) == trt_engine.STEPS
    engine.close()


def test_a_plan_for_another_gpu_or_version_is_refused_with_the_command(
    device: fake_gpu.FakeDevice, directory: Path, manifest: Manifest
) -> None:
    stage = manifest.stages[0]
    library = fake_gpu.fake_library(device, manifest, COMPUTE)

    def load(gpu: object, lib: object) -> None:
        made = TensorRTBackend(
            "tensorrt_rtx",
            lambda: device,
            lambda: gpu,
            lambda _name: lib,  # type: ignore[arg-type, return-value]
        )
        made.load(directory / stage.file, stage, 1)

    other = type(fake_gpu.GPU)("Fake Ampere", 86, 1, "13.0")
    with pytest.raises(QuantVLAError, match=r"not built for sm86-fake-ampere.*run: quantvla build"):
        load(other, library)
    newer = type(library)(library.name, "1.8.0", library.trt)
    with pytest.raises(QuantVLAError, match=r"not built for sm89-fake-ada-tensorrt-rtx-1.8.0"):
        load(fake_gpu.GPU, newer)


def test_a_changed_or_foreign_plan_is_refused(
    backend: TensorRTBackend, directory: Path, manifest: Manifest
) -> None:
    stage = manifest.stages[0]
    path = plan_directory(directory, HERE) / "vision.plan"
    path.write_bytes(b"other")
    with pytest.raises(QuantVLAError, match=r"vision.plan: missing or changed.*quantvla build"):
        backend.load(directory / stage.file, stage, 1)
    write_plans(directory)
    changed = msgspec.structs.replace(stage.inputs[0], shape=(1, 2, 3))
    wrong = msgspec.structs.replace(stage, inputs=(changed,))
    with pytest.raises(QuantVLAError, match=r"tensor 'image' differs from the manifest"):
        backend.load(directory / stage.file, wrong, 1)


def test_without_a_gpu_the_error_says_so(directory: Path, manifest: Manifest) -> None:
    try:
        find_gpu()
    except QuantVLAError as error:
        assert "no CUDA driver on this machine" in str(error) or "finds none" in str(error)
    else:
        pytest.skip("this machine has a GPU")


def test_every_gpu_target_has_a_backend() -> None:
    assert TARGETS.keys() <= backends.BACKENDS.keys()


@pytest.mark.slow
def test_an_engine_runs_on_the_gpu_of_this_machine(tmp_path: Path) -> None:
    """The same engine, built and run for real; ONNX Runtime on the CPU is the reference."""
    try:
        gpu = find_gpu()
    except QuantVLAError as error:
        pytest.skip(f"no GPU to run on ({error})")
    if gpu.compute_capability not in TARGETS["rtx"].compute_capabilities:
        pytest.skip(f"tensorrt_rtx does not run on {gpu.name} (SM{gpu.compute_capability})")
    assert gpu.compute_capability in FORMATS
    pytest.importorskip("tensorrt_rtx")
    onnxruntime = pytest.importorskip("onnxruntime")
    from quantvla.runtime.tensorrt_build import build_engine

    directory = trt_engine.write_trt_engine(tmp_path / "engine")
    build_engine(directory)
    manifest = read_manifest(directory)
    backend = TensorRTBackend("tensorrt_rtx", CudaDevice)
    rng = np.random.default_rng(0)
    for stage in manifest.stages:
        inputs = {s.name: rng.standard_normal(s.shape).astype(s.dtype) for s in stage.inputs}
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        reference = onnxruntime.InferenceSession(directory / stage.file, options)
        session = backend.load(directory / stage.file, stage, 1)
        found = session.run(inputs)
        for spec, value in zip(stage.outputs, reference.run(None, inputs), strict=True):
            np.testing.assert_allclose(found[spec.name], value, rtol=2e-2, atol=2e-2)
        session.close()
