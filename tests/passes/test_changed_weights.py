"""Where float weights that a pass changed live: a policy of many gigabytes does not fit twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open

from quantvla.passes import RoundWeights, Smooth
from quantvla.pipeline import Pipeline
from quantvla.recipe import Recipe, read_recipe


def mapped_file(address: int) -> str:
    """Return the file whose pages are at ``address``, "" for memory of the process's own."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        region, *_, last = line.split(maxsplit=5)
        low, high = (int(end, 16) for end in region.split("-"))
        if low <= address < high:
            return last if last.startswith("/") else ""
    return ""


def test_what_a_pass_changed_are_pages_of_its_file(
    pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    base = read_recipe("rtn-w4a8")
    passes = (Smooth(exponents=(0.25,)), RoundWeights())
    made = pipeline(Recipe(name="test", rules=base.rules, default=base.default, passes=passes))
    made.run(passes)
    path = tmp_path / "work" / "pass-0" / "floats.safetensors"
    with safe_open(path, framework="pt") as stored:
        names = list(stored.keys())
    parameters = dict(made.subject.policy.named_parameters())
    assert names
    for name in names:
        assert mapped_file(parameters[name].data_ptr()) == str(path)


def test_frames_to_compare_folds_with_are_run_for_recipes_that_fold(
    pipeline: Callable[..., Pipeline],
) -> None:
    made = pipeline("rtn-w4a8")
    made.run(read_recipe("rtn-w4a8").passes)
    assert made.check._expected is None
