"""The steps before and after a policy, as data: a part of the manifest."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

PositiveInt = Annotated[int, msgspec.Meta(gt=0)]
Normalization = Literal["identity", "mean_std", "min_max", "quantiles", "quantile10"]
"""Modes of lerobot's NormalizerProcessorStep."""


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all parts of a manifest: immutable, and an unknown key is an error."""


class Images(Strict, frozen=True, kw_only=True, tag_field="kind", tag="images"):
    """HWC uint8 RGB images -> ``output`` (cameras, 3, height, width) float32, in the order of ``keys``.

    Pixels / 255; bilinear resize without antialiasing that keeps the aspect ratio; padding with
    ``pad_value`` (in [0, 1]) left and top, or around the centred image; then ``scale * x + offset``.
    Resize is skipped when ``resize`` is null; ``resize`` is (height, width).
    """

    keys: tuple[str, ...]
    output: str
    resize: tuple[PositiveInt, PositiveInt] | None
    pad_value: float
    scale: float
    offset: float
    pad: Literal["top_left", "around"] = "top_left"


class ResampledImages(Strict, frozen=True, kw_only=True, tag_field="kind", tag="resampled_images"):
    """HWC uint8 RGB images -> ``output`` (cameras, 3, height, width) float32, in the order of ``keys``.

    In 8 bits: a black square around the image where ``square``, bicubic antialiased resize to
    ``first``, the middle of size ``crop``, resize to ``size`` (all (height, width)). Then
    ``scale * x / 255 + offset``.
    """

    keys: tuple[str, ...]
    output: str
    square: bool
    first: tuple[PositiveInt, PositiveInt]
    crop: tuple[PositiveInt, PositiveInt]
    size: tuple[PositiveInt, PositiveInt]
    scale: float
    offset: float


class Normalize(Strict, frozen=True, kw_only=True, tag_field="kind", tag="normalize"):
    """A vector of the observation -> ``output``, normalized with the statistics of ``key``.

    Modes as in lerobot's NormalizerProcessorStep (``eps`` guards the division). With ``clip`` the
    result is cut at -1 and 1, with ``flat_to_zero`` an entry that never changed becomes 0. It is
    padded with zeros to ``pad_to`` and gets a leading batch axis: (1, pad_to) float32.
    """

    key: str
    output: str
    mode: Normalization
    eps: float
    pad_to: PositiveInt
    clip: bool = False
    flat_to_zero: bool = False


class StateText(Strict, frozen=True, kw_only=True):
    """The state as text: the vector at ``key``, normalized like `Normalize`, then for each entry the number of its bin.

    ``bins`` equal bins cover [-1, 1); what lies below is -1, what lies above the last number.
    """

    key: str
    mode: Normalization
    eps: float
    bins: PositiveInt


class Prompt(Strict, frozen=True, kw_only=True):
    """How a sentence becomes the text that is tokenized.

    Stripped where ``strip``, then every pair of ``replace``, in order; ``plain`` makes it lower case and
    leaves letters, digits, spaces and underscores only, and ``empty`` is taken where nothing is left. Last it
    takes the place of ``{task}`` in ``template``, and the state's numbers, with spaces between, that of ``{state}``.
    """

    template: str = "{task}"
    strip: bool = False
    replace: tuple[tuple[str, str], ...] = ()
    plain: bool = False
    empty: str = ""
    state: StateText | None = None


class Tokenize(Strict, frozen=True, kw_only=True, tag_field="kind", tag="tokenize"):
    """The task sentence -> ``tokens`` (1, max_length) int64 and ``mask`` (1, max_length) bool.

    The sentence is put into ``prompt``; ``suffix`` is appended unless the text ends with it.
    ``file`` is a `tokenizers` JSON file in the engine directory. Padded on the right with
    ``pad_id``; longer text is cut at ``max_length``.
    """

    key: str
    file: str
    suffix: str
    max_length: PositiveInt
    pad_id: int
    tokens: str
    mask: str
    prompt: Prompt = Prompt()


PreprocessStep = Images | ResampledImages | Normalize | Tokenize


class Unnormalize(Strict, frozen=True, kw_only=True, tag_field="kind", tag="unnormalize"):
    """Model output (1, horizon, padded) -> (horizon, dim) in physical units, statistics of ``key``.

    Only the leading ``horizon`` steps where it is given; ``clip`` cuts the model's output at -1 and 1 before.
    """

    key: str
    mode: Normalization
    eps: float
    dim: PositiveInt
    horizon: PositiveInt | None = None
    clip: bool = False


class AddState(Strict, frozen=True, kw_only=True, tag_field="kind", tag="add_state"):
    """Actions relative to the state of their observation -> absolute ones.

    Entry i of every action gets entry i of ``tensor`` (1, at least dim), which preprocessing made,
    where ``mask`` is true; ``mask`` covers the leading entries.
    """

    tensor: str
    mask: tuple[bool, ...]


PostprocessStep = Unnormalize | AddState


class FeatureStatistics(Strict, frozen=True, kw_only=True):
    """Per-dimension statistics of one feature, physical units; absent ones are null."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    min: tuple[float, ...] | None = None
    max: tuple[float, ...] | None = None
    q01: tuple[float, ...] | None = None
    q99: tuple[float, ...] | None = None
    q10: tuple[float, ...] | None = None
    q90: tuple[float, ...] | None = None


def command_statistics(
    steps: tuple[PostprocessStep, ...], statistics: dict[str, FeatureStatistics]
) -> FeatureStatistics | None:
    """Return the statistics of the commands that postprocessing returns.

    None where there are none: the statistics of actions relative to the state are of displacements.
    """
    first, *rest = steps
    relative = any(isinstance(step, AddState) and any(step.mask) for step in rest)
    return None if relative or not isinstance(first, Unnormalize) else statistics.get(first.key)
