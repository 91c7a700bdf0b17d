"""A film of rollouts as one animated GIF: a block per task, its arms side by side in the same episode."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from quantvla.evaluate.rollouts import Rollout
from quantvla.runtime.errors import explain
from quantvla.runtime.files import write_atomic

MAX_BYTES = 3_000_000
_PANEL_SIZES = (200, 168, 144, 120, 96)
_BLOCKS_PER_ROW = 2
_COLOURS = 64
_FRAME_MS = 90
_LAST_FRAME_MS = 1500
_GAP = 6
_BAND = 18
_GROUND, _TEXT = (22, 27, 34), (230, 230, 230)
_SOLVED, _FAILED, _RUNNING = (63, 185, 80), (248, 81, 73), (139, 148, 158)


def write_film(rollouts: Sequence[Rollout], path: Path) -> None:
    """Write the film at the largest picture size that stays below 3 MB; the same rollouts give the same bytes."""
    if not rollouts:
        raise explain(path, "no rollouts to film", remedy="record at least one task")
    for size in _PANEL_SIZES:
        data = _encode(_compose(rollouts, size))
        if len(data) <= MAX_BYTES:
            break
    write_atomic(path, data)


def _compose(rollouts: Sequence[Rollout], size: int) -> list[Image.Image]:
    """Return the frames of the film; a rollout that is over keeps its last picture."""
    tasks = list(dict.fromkeys(rollout.task for rollout in rollouts))
    arms = list(dict.fromkeys(rollout.arm for rollout in rollouts))
    columns = min(_BLOCKS_PER_ROW, len(tasks))
    block = (len(arms) * (size + _GAP) + _GAP, size + 2 * _BAND + _GAP)
    canvas = (columns * block[0], -(-len(tasks) // columns) * block[1])
    film = []
    for index in range(max(len(rollout.frames) for rollout in rollouts)):
        picture = Image.new("RGB", canvas, _GROUND)
        for rollout in rollouts:
            row, column = divmod(tasks.index(rollout.task), columns)
            left = column * block[0] + _GAP + arms.index(rollout.arm) * (size + _GAP)
            _draw_panel(picture, rollout, index, (left, row * block[1]), size)
        film.append(picture)
    return film


def _draw_panel(
    picture: Image.Image, rollout: Rollout, index: int, corner: tuple[int, int], size: int
) -> None:
    left, top = corner
    last = len(rollout.frames) - 1
    colour, verdict = _RUNNING, ""
    if index >= last:
        colour = _SOLVED if rollout.success else _FAILED
        verdict = "solved" if rollout.success else "not solved"
    frame = Image.fromarray(rollout.frames[min(index, last)])
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=12)
    pen.text((left, top + 3), rollout.task.removesuffix("-v3"), fill=_RUNNING, font=font)
    caption = f"{rollout.arm}  {verdict}"
    pen.text((left, top + _BAND + size + 3), caption, fill=_TEXT, font=font)
    box = (left, top + _BAND, left + size - 1, top + _BAND + size - 1)
    picture.paste(frame.resize((size, size), Image.Resampling.LANCZOS), box[:2])
    pen.rectangle(box, outline=colour, width=2)


def _encode(film: Sequence[Image.Image]) -> bytes:
    """Return the GIF. One palette and no dithering, so that what stands still costs nothing."""
    palette = film[-1].quantize(_COLOURS, method=Image.Quantize.MEDIANCUT)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in film]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=[_FRAME_MS] * (len(frames) - 1) + [_LAST_FRAME_MS],
        loop=0,
        optimize=False,
    )
    return buffer.getvalue()
