"""A manifest whose parts do not fit together is refused before anything is loaded."""

from __future__ import annotations

import msgspec
import pytest
from tiny_engine import make_manifest

from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.processing_steps import Images
from quantvla.runtime.wiring import check_wiring

replace = msgspec.structs.replace
BASE = make_manifest()
VISION, PREFIX, DENOISE = BASE.stages
SAMPLER = BASE.sampler
LOOP = replace(DENOISE, name="loop", repeat=1, inputs=DENOISE.inputs[::2])
IMAGES = BASE.preprocess[0]
assert isinstance(IMAGES, Images)


def test_wiring_of_a_sound_manifest() -> None:
    check_wiring(BASE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stages": (PREFIX, DENOISE)}, "stage 'prefix' input 'features': nothing makes it"),
        ({"preprocess": BASE.preprocess[:2]}, "stage 'prefix' input 'tokens': nothing makes it"),
        (
            {"preprocess": (replace(IMAGES, resize=(9, 9)), *BASE.preprocess[1:])},
            r"stage 'vision' input 'images': expected float32 \[2, 3, 8, 12\], got float32 \[2, 3, 9, 9\]",
        ),
        (
            {"preprocess": (replace(IMAGES, keys=("observation.images.frnt",)),)},
            "unknown camera .*did you mean 'observation.images.front'",
        ),
        ({"preprocess": (*BASE.preprocess, IMAGES)}, "tensor 'images': is made twice"),
        ({"stages": (DENOISE, VISION, PREFIX)}, "stage 'denoise' must be the last one"),
        ({"stages": ()}, "stage 'denoise' must be the last one"),
        ({"stages": (VISION, VISION, DENOISE)}, "two have the same name"),
        (
            {"stages": (VISION, PREFIX, replace(DENOISE, repeat=3))},
            "stage 'denoise': expected repeat 10, got 3",
        ),
        (
            {"stages": (replace(VISION, repeat=2), PREFIX, DENOISE)},
            r"stage 'vision' tensor 'images': runs 2 times a chunk, expected one row, got \[2, 3, 8, 12\]",
        ),
        ({"sampler": replace(SAMPLER, velocity="v")}, "expected an output 'v' float32"),
        (
            {"sampler": replace(SAMPLER, noise_shape=(1, 9, 6))},
            r"expected noise of shape \[1, 4, at least 2\], got \[1, 9, 6\]",
        ),
        (
            {"sampler": replace(SAMPLER, step=(-0.5, -0.5))},
            "sampler: expected 10 step sizes, got 2",
        ),
        (
            {"sampler": replace(SAMPLER, step=(-0.2, *(-0.1,) * 9))},
            "sampler: steps must lead from each time to the next",
        ),
        (
            {"sampler": replace(SAMPLER, step=(*(-0.1,) * 9, 0.1))},
            "sampler: steps must lead from each time to the next",
        ),
        (
            {"loop": replace(LOOP, inputs=DENOISE.inputs)},
            "stage 'loop' input 'time': nothing makes it",
        ),
        (
            {"loop": replace(LOOP, outputs=PREFIX.outputs)},
            r"stage 'loop': expected one output, float32 \[1, 4, 6\], got \['context float32",
        ),
        ({"loop": replace(LOOP, file="loop.onnx")}, "files: 'loop.onnx' has no checksum"),
        ({"action": replace(BASE.action, execute=5)}, "cannot execute more than 4, got 5"),
        ({"action": replace(BASE.action, dim=3)}, "postprocessing: expected dim 3, got 2"),
        ({"action": replace(BASE.action, names=("x",))}, "action: expected 2 names, got 1"),
        ({"files": {}}, "files: 'vision.onnx' has no checksum"),
        ({"files": BASE.files | {"../x": ""}}, "must lie inside the engine directory"),
    ],
)
def test_wiring_errors(fields: dict[str, object], message: str) -> None:
    with pytest.raises(QuantVLAError, match=f"^manifest .*{message}"):
        check_wiring(replace(BASE, **fields))
