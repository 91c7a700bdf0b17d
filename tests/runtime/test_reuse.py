"""Work of the last chunk that is taken again: exact where it must be, bounded where it may differ."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from tiny_engine import CAMERAS, change_manifest, observation, write_graph

from quantvla.cli.main import cli
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.files import sha256_file
from quantvla.runtime.manifest import read_manifest
from quantvla.runtime.policy import Policy
from quantvla.runtime.reuse import ReuseSpec


@pytest.fixture
def apart(engine: Path) -> Path:
    """The engine with a vision stage that takes one camera."""
    manifest = read_manifest(engine)
    vision, *others = manifest.stages
    one = msgspec.structs.replace(
        vision,
        repeat=2,
        inputs=(msgspec.structs.replace(vision.inputs[0], shape=(1, *vision.inputs[0].shape[1:])),),
        outputs=(msgspec.structs.replace(vision.outputs[0], shape=(1, 3)),),
    )
    write_graph(engine, one, [("ReduceMean", ["images", "plane"], "features")], plane=[2, 3])
    files = {**manifest.files, one.file: sha256_file(engine / one.file)}
    change_manifest(engine, stages=(one, *others), files=files)
    return engine


@contextmanager
def opened(engine: Path, **options: object) -> Iterator[Policy]:
    reuse = ReuseSpec(**options) if options else None  # type: ignore[arg-type]
    with Policy.from_pretrained(engine, threads=1, reuse=reuse) as policy:
        yield policy


def brighter(obs: dict[str, object], by: int, *keys: str) -> dict[str, object]:
    changed = {key: np.clip(obs[key], 0, 200) + np.uint8(by) for key in keys}  # type: ignore[call-overload]
    return {**obs, **changed}


def runs(policy: Policy, obs: dict[str, object]) -> tuple[np.ndarray, dict[str, int]]:
    with policy.timing() as durations:
        chunk = policy.predict_action_chunk(obs, seed=0)
    return chunk, {stage: len(durations.get(stage, ())) for stage in ("vision", "prefix")}


def test_one_camera_at_a_time_gives_what_all_at_once_do(pristine_engine: Path, apart: Path) -> None:
    with opened(pristine_engine) as whole, opened(apart) as rows:
        for seed in range(3):
            ours, count = runs(rows, observation(seed))
            np.testing.assert_array_equal(ours, runs(whole, observation(seed))[0])
            assert count == {"vision": 2, "prefix": 1} and rows.reuse_counts is None


def test_nothing_but_identical_inputs_is_reused_at_threshold_zero(apart: Path) -> None:
    first = observation(0)
    one_pixel = {**first, CAMERAS[0]: first[CAMERAS[0]].copy()}  # type: ignore[attr-defined]
    one_pixel[CAMERAS[0]][0, 0, 0] ^= 1
    moved = {**first, "observation.state": observation(1)["observation.state"]}
    expected = [(2, 1), (0, 0), (1, 1), (1, 1), (0, 1), (0, 0)]
    with opened(apart) as plain, opened(apart, cameras=0.0, prefix=True) as policy:
        for obs, (vision, prefix) in zip(
            (first, first, one_pixel, first, moved, moved), expected, strict=True
        ):
            ours, count = runs(policy, obs)
            np.testing.assert_array_equal(ours, runs(plain, obs)[0])
            assert count == {"vision": vision, "prefix": prefix}
        counts = policy.reuse_counts
        assert counts is not None and (counts.images, counts.images_reused) == (12, 8)
        assert (counts.prefixes, counts.prefixes_reused) == (6, 2)


def test_pictures_are_compared_with_those_the_tokens_came_from(apart: Path) -> None:
    """Drift of 2 a chunk with a threshold of 5 must be noticed at the third, not never."""
    start = brighter(observation(0), 0, *CAMERAS)
    with opened(apart, cameras=5.0) as policy:
        found = [runs(policy, brighter(start, 2 * i, *CAMERAS)) for i in range(5)]
    assert [count["vision"] for _, count in found] == [2, 0, 0, 2, 0]
    np.testing.assert_array_equal(found[0][0], found[2][0])
    assert not np.array_equal(found[2][0], found[3][0])


def test_only_the_changed_camera_is_run_where_the_engine_can(
    pristine_engine: Path, apart: Path
) -> None:
    start = brighter(observation(0), 0, *CAMERAS)
    other = brighter(start, 40, CAMERAS[1])
    with opened(apart, cameras=5.0) as rows, opened(pristine_engine, cameras=5.0) as whole:
        for policy, vision in ((rows, 1), (whole, 1)):
            runs(policy, start)
            assert runs(policy, other)[1]["vision"] == vision
        np.testing.assert_array_equal(runs(rows, other)[0], runs(whole, other)[0])
        found = [policy.reuse_counts for policy in (rows, whole)]
    assert [c.images_reused for c in found if c is not None] == [3, 2]


def test_a_buffer_that_the_camera_overwrites_is_no_unchanged_picture(apart: Path) -> None:
    obs = observation(0)
    with opened(apart, cameras=0.0) as policy:
        runs(policy, obs)
        obs[CAMERAS[0]][:] = 255 - obs[CAMERAS[0]]  # type: ignore[index, operator]
        assert runs(policy, obs)[1]["vision"] == 1


def test_an_episode_and_warming_up_leave_nothing_behind(apart: Path) -> None:
    with opened(apart, cameras=255.0, prefix=True) as policy:
        policy.warm_up(2)
        assert policy.reuse_counts is not None and policy.reuse_counts.images == 0
        assert runs(policy, policy.blank_observation())[1] == {"vision": 2, "prefix": 1}
        policy.reset()
        assert runs(policy, policy.blank_observation())[1] == {"vision": 2, "prefix": 1}


@pytest.mark.parametrize("threshold", [-1.0, 256.0, float("nan")])
def test_thresholds_that_are_no_difference(pristine_engine: Path, threshold: float) -> None:
    with (
        pytest.raises(QuantVLAError, match="reuse cameras: expected a mean difference of 0 to 255"),
        opened(pristine_engine, cameras=threshold),
    ):
        pass


ROBOT = """
class Robot:
    ticks = 0
    def observe(self):
        from tiny_engine import observation
        return observation(self.ticks // 6)
    def act(self, action):
        self.ticks += 1
    def stop(self):
        pass
"""


def test_a_run_counts_what_it_reused_and_replays(
    apart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "still_robot.py").write_text(ROBOT)
    monkeypatch.syspath_prepend(tmp_path)
    path, trace = tmp_path / "run.toml", tmp_path / "trace.jsonl"

    def run(reuse: str) -> str:
        path.write_text(
            f'engine = "{apart}"\nthreads = 1\n[robot]\nkind = "python"\nfactory = "still_robot:Robot"\n'
            f'[loop]\nrate_hz = 20\nseconds = 1\nclock = "virtual"\n[log]\ntrace = "{trace}"\n[reuse]\n{reuse}'
        )
        asked = ["run", "--config", str(path), "--json"]
        return CliRunner().invoke(cli, asked, catch_exceptions=False).stdout

    counts = json.loads(run("cameras = 0\nprefix = true\n"))["reuse"]
    assert 0 < counts["images_reused"] < counts["images"]
    assert 0 < counts["prefixes_reused"] < counts["prefixes"]
    again = CliRunner().invoke(cli, ["replay", str(trace)], catch_exceptions=False)
    assert again.exit_code == 0 and "inferences identical" in again.stdout
    for wrong in ("cameras = -1\n", "camera = 1\n"):
        with pytest.raises(QuantVLAError, match="not a valid run file"):
            run(wrong)
