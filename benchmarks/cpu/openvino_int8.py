"""Quantize the float graphs with NNCF to int8 weights and activations; run in an environment with openvino and nncf.

python benchmarks/cpu/openvino_int8.py FLOAT_DIRECTORY INPUTS.npz OUTPUT_DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino
from peer import STAGES, chunk, openvino_stage


def main() -> None:
    """Collect each stage's inputs of one float chunk, quantize each stage with them, write it as OpenVINO IR."""
    directory, inputs, output = (Path(argument) for argument in sys.argv[1:4])
    output.mkdir(parents=True, exist_ok=True)
    with np.load(inputs) as file:
        given = dict(file)
    samples: dict[str, list[dict[str, Any]]] = {}
    stages = {}
    for name in STAGES:
        run = openvino_stage(directory / f"{name}.onnx", 2, "f32")

        def recorded(known: dict[str, Any], name: str = name, run: Any = run) -> dict[str, Any]:
            samples.setdefault(name, []).append(dict(known))
            found: dict[str, Any] = run(known)
            return found

        stages[name] = recorded
    chunk(stages, given, {})
    for name in STAGES:
        model = openvino.Core().read_model(directory / f"{name}.onnx")
        names = [port.get_any_name() for port in model.inputs]
        data = [{key: sample[key] for key in names} for sample in samples[name]]
        quantized = nncf.quantize(
            model, nncf.Dataset(data), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(data),
            preset=nncf.QuantizationPreset.MIXED,
        )  # fmt: skip
        openvino.save_model(quantized, output / f"{name}.xml", compress_to_fp16=False)


if __name__ == "__main__":
    main()
