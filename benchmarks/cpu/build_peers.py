"""The graphs that the peers run: torch's export as it is, and stock quantizations of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from quantvla import staged
from quantvla.export.graphs import export_graph, save_graph
from quantvla.families import load_policy

STAGES = ("vision", "prefix", "denoise")
BLOCK, INT8_ACTIVATIONS = 128, 4


def observation(policy: Path, seed: int) -> dict[str, object]:
    """Return a random observation of the policy."""
    interface = load_policy(policy).interface
    rng = np.random.default_rng(seed)
    obs: dict[str, object] = {
        camera.key: rng.integers(0, 256, (camera.height, camera.width, 3), dtype=np.uint8)
        for camera in interface.cameras
    }
    state = rng.standard_normal(interface.state.dim).astype(np.float32)
    return {**obs, interface.state.key: state, interface.task_key: "push the red block"}


def write_inputs(policy: Path, path: Path) -> None:
    """Write one preprocessed observation, the noise and the schedule: what every arm is given."""
    interface = load_policy(policy).interface
    tensors = staged.prepare(staged.make_preprocessor(interface), observation(policy, 0))
    noise = np.random.default_rng(0).standard_normal(interface.sampler.noise_shape, np.float32)
    np.savez(
        path, **tensors, noise=noise, step=np.float32(interface.sampler.step),
        timesteps=np.array(interface.sampler.timesteps, np.float32),
    )  # fmt: skip


def write_calibration_set(policy: Path, directory: Path, frames: int = 4) -> None:
    """Write random observations as NPZ files, two episodes of them."""
    directory.mkdir(parents=True)
    for index in range(frames):
        np.savez(
            directory / f"{index:03d}.npz", **observation(policy, index),
            episode=index * 2 // frames, frame=index,
        )  # fmt: skip


def export_straight(policy: Path, directory: Path, opset: int) -> None:
    """Write torch's export of every stage, nothing rewritten."""
    directory.mkdir(parents=True)
    torch.set_num_threads(2)
    for stage in load_policy(policy).stages:
        save_graph(export_graph(stage, opset=opset), directory / f"{stage.name}.onnx")


def build_dynamic_int8(straight: Path, directory: Path) -> None:
    """Write ONNX Runtime's dynamic quantization of the straight graphs, weights per channel."""
    directory.mkdir(parents=True)
    for name in STAGES:
        quantize_dynamic(
            straight / f"{name}.onnx", directory / f"{name}.onnx", per_channel=True,
            weight_type=QuantType.QInt8, use_external_data_format=True,
        )  # fmt: skip


def build_nbits(straight: Path, directory: Path) -> None:
    """Write ONNX Runtime's 4-bit block quantization of the straight graphs, int8 activations."""
    directory.mkdir(parents=True)
    for name in STAGES:
        quantizer = MatMulNBitsQuantizer(
            onnx.load(straight / f"{name}.onnx"), block_size=BLOCK, is_symmetric=True,
            accuracy_level=INT8_ACTIVATIONS,
        )  # fmt: skip
        quantizer.process()
        quantizer.model.save_model_to_file(str(directory / f"{name}.onnx"), True)
