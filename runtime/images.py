"""Camera images -> the tensor that the first stage reads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.errors import explain
from quantvla.runtime.manifest import CameraSpec
from quantvla.runtime.observation import read_image
from quantvla.runtime.processing_steps import Images, ResampledImages
from quantvla.runtime.resample import centre_crop, pad_to_square, resample
from quantvla.runtime.resize import fit_plane, fitted_size

Tensors = dict[str, NDArray[Any]]

_logger = logging.getLogger(__name__)


def make_image_runner(
    step: Images | ResampledImages, cameras: Sequence[CameraSpec]
) -> Callable[[Mapping[str, object]], Tensors]:
    """Return the function that executes ``step`` on an observation."""
    if isinstance(step, Images):
        return _FittedRunner(step, cameras)
    return _ResampledRunner(step, cameras)


class _Sizes:
    """What sizes the cameras' images should have; another aspect ratio is warned of once per camera."""

    def __init__(self, cameras: Sequence[CameraSpec]) -> None:
        self._expected = {c.key: (c.height, c.width) for c in cameras}
        self._warned: set[str] = set()

    def expected(self, key: str, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size that the policy's camera has; ``size`` when nothing says it."""
        return self._expected.get(key, size)

    def note(self, key: str, size: tuple[int, int]) -> None:
        """Warn when an image of ``size`` is not what the camera should give."""
        expected = self.expected(key, size)
        if size == expected or key in self._warned:
            return
        self._warned.add(key)
        same = size[0] * expected[1] == size[1] * expected[0]
        _logger.warning(
            "observation %r: the policy's camera is %dx%d (height x width), got %dx%d; %s",
            key,
            *expected,
            *size,
            "it is resized"
            if same
            else "the aspect ratio differs, so objects appear at other "
            "places than in training: crop the image unless the policy was trained like this",
        )


class _FittedRunner:
    def __init__(self, step: Images, cameras: Sequence[CameraSpec]) -> None:
        self._step, self._sizes = step, _Sizes(cameras)

    def __call__(self, obs: Mapping[str, object]) -> Tensors:
        step = self._step
        images = [read_image(obs, key) for key in step.keys]
        for key, image in zip(step.keys, images, strict=True):
            self._check_size(key, (image.shape[0], image.shape[1]))
        sizes = {image.shape[:2] for image in images}
        if step.resize is None and len(sizes) > 1:
            raise explain(
                f"observation {', '.join(map(repr, step.keys))}",
                "cameras must have one size, since the engine does not resize",
                got=", ".join(f"{height}x{width}" for height, width in sorted(sizes)),
                remedy="resize them before",
            )
        size = step.resize or images[0].shape[:2]
        tensor = np.empty((len(images), 3, *size), dtype=np.float32)
        for image, planes in zip(images, tensor, strict=True):
            _fit(image, planes, step)
        if step.scale != 1:
            tensor *= np.float32(step.scale)
        if step.offset != 0:
            tensor += np.float32(step.offset)
        return {step.output: tensor}

    def _check_size(self, key: str, size: tuple[int, int]) -> None:
        resize = self._step.resize
        if resize is not None and 0 in fitted_size(size, resize):
            raise explain(
                f"observation {key!r}",
                f"image is too thin to fit into {resize[0]}x{resize[1]}",
                got=f"{size[0]}x{size[1]} (height x width)",
                remedy="check the camera",
            )
        expected = self._sizes.expected(key, size)
        if resize is None and size != expected:
            raise explain(
                f"observation {key!r}",
                f"expected an image of {expected[0]}x{expected[1]} (height x width), and the "
                "engine does not resize",
                got=f"{size[0]}x{size[1]}",
                remedy="resize it before",
            )
        self._sizes.note(key, size)


def _fit(image: NDArray[np.uint8], planes: NDArray[np.float32], step: Images) -> None:
    """Write ``image`` (height, width, 3) as numbers from 0 to 1 into ``planes`` (3, height, width), resized to fit."""
    if image.shape[:2] == planes.shape[1:]:
        planes[...] = image.transpose(2, 0, 1)
        planes /= np.float32(255)
        return
    for channel, output in enumerate(planes):
        plane = image[:, :, channel].astype(np.float32)
        plane /= np.float32(255)
        fit_plane(plane, output, step.pad_value, around=step.pad == "around")


class _ResampledRunner:
    def __init__(self, step: ResampledImages, cameras: Sequence[CameraSpec]) -> None:
        self._step, self._sizes = step, _Sizes(cameras)

    def __call__(self, obs: Mapping[str, object]) -> Tensors:
        step = self._step
        tensor = np.empty((len(step.keys), 3, *step.size), dtype=np.float32)
        for key, planes in zip(step.keys, tensor, strict=True):
            image = read_image(obs, key)
            self._sizes.note(key, (image.shape[0], image.shape[1]))
            if step.square:
                image = pad_to_square(image)
            image = centre_crop(resample(image, step.first), step.crop)
            planes[...] = resample(image, step.size).transpose(2, 0, 1)
        tensor *= np.float32(step.scale / 255)
        tensor += np.float32(step.offset)
        return {step.output: tensor}
