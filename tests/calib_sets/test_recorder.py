"""Recording on a robot: whole or not at all, and wrong observations are refused at once."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from invented_robot import TOP, WRIST, Episodes, Observe

from quantvla.calib_sets import Observation, Recorder, RobotSpec, open_set, record
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.manifest import CameraSpec, VectorSpec

STATE = "observation.state"


def test_the_set_appears_only_at_the_end(tmp_path: Path, episodes: Episodes) -> None:
    with Recorder(tmp_path / "set", name="kitchen") as recorder:
        for observation, episode, frame in episodes():
            recorder.add(observation, episode=episode, frame=frame)
        assert not (tmp_path / "set").exists()
    opened = open_set(tmp_path / "set")
    assert opened.card.name == "kitchen"
    assert [camera.key for camera in opened.robot.cameras] == [TOP, WRIST]
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]


def test_extra_keys_of_a_robot_are_not_recorded(tmp_path: Path, episodes: Episodes) -> None:
    extra = (({**o, "observation.effort": np.ones(3)}, e, f) for o, e, f in episodes())
    assert set(record(extra, tmp_path / "set")[0].observation) == {TOP, WRIST, STATE, "task"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_error_in_the_loop_leaves_nothing_and_passes_through(
    tmp_path: Path, observe: Observe, error: type[BaseException]
) -> None:
    with (
        pytest.raises(error, match="camera unplugged"),
        Recorder(tmp_path / "set") as recorder,
    ):
        recorder.add(observe(), episode=0, frame=0)
        raise error("camera unplugged")
    assert list(tmp_path.iterdir()) == []


def test_sigkill_leaves_no_set_and_a_rerun_succeeds(tmp_path: Path, episodes: Episodes) -> None:
    script = f"""
import os, signal, numpy as np
from quantvla.calib_sets import Recorder
with Recorder({str(tmp_path / "set")!r}) as recorder:
    for frame in range(20):
        image = np.zeros((16, 24, 3), np.uint8)
        state = np.array([frame], np.float32)
        observation = {{"{TOP}": image, "observation.state": state, "task": "t"}}
        recorder.add(observation, episode=0, frame=frame)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "set").exists()
    with pytest.raises(QuantVLAError, match=r"set.partial: holds no calibration frames"):
        open_set(tmp_path / "set.partial")
    assert len(record(episodes(), tmp_path / "set")) == 60
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]


def test_sigkill_while_replacing_keeps_the_old_set(tmp_path: Path, episodes: Episodes) -> None:
    before = record(episodes(), tmp_path / "set").checksum
    script = f"""
import os, signal
from quantvla.calib_sets import Recorder
with Recorder({str(tmp_path / "set")!r}, overwrite=True):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    assert open_set(tmp_path / "set").checksum == before


def test_disk_full(tmp_path: Path, episodes: Episodes, monkeypatch: pytest.MonkeyPatch) -> None:
    write, left = Path.write_bytes, [7]

    def filling(path: Path, data: bytes) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", filling)
    with pytest.raises(
        QuantVLAError, match=r"could not be written, got .*No space left.*free space"
    ):
        record(episodes(), tmp_path / "set")
    left[0] = 120  # every picture fits, the card does not
    with pytest.raises(
        QuantVLAError, match=r"could not be written, got .*No space left.*free space"
    ):
        record(episodes(), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused_before_anything_is_recorded(
    tmp_path: Path, episodes: Episodes
) -> None:
    first = record(episodes(), tmp_path / "set")
    with pytest.raises(QuantVLAError, match="set: already exists; choose another output"):
        record(iter(()), tmp_path / "set")
    other = record(episodes(tasks=3), tmp_path / "set", overwrite=True)
    assert other.checksum != first.checksum


@pytest.mark.parametrize("frames", [0, 1, 3])
def test_too_few_frames(tmp_path: Path, episodes: Episodes, frames: int) -> None:
    message = (
        "no frame was recorded" if frames == 0 else f"at least 4 frames .*got {frames}; record"
    )
    with pytest.raises(QuantVLAError, match=message):
        record(episodes(count=1, frames=frames), tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_the_same_frame_twice(tmp_path: Path, observe: Observe) -> None:
    twice = [(observe(e, f), e, min(f, 3)) for e in range(2) for f in range(5)]
    with pytest.raises(QuantVLAError, match="episode 0 frame 3 occurs more than once"):
        record(twice, tmp_path / "set")


def broken(observation: Observation, key: str, value: object) -> Observation:
    """Return the observation with one entry replaced, or removed when ``value`` is None."""
    return {k: v for k, v in {**observation, key: value}.items() if v is not None}


IMAGE = np.zeros((16, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (TOP, IMAGE.transpose(2, 0, 1), r"top: an image must be .*got \(3, 16, 24\).*transpose"),
        (TOP, IMAGE / 255.0, r"top: an image must be .*got .* float64; .*astype\(np.uint8\)"),
        (TOP, IMAGE[:, :, 0], r"top: an image must be \(height, width, 3\).*got \(16, 24\)"),
        (TOP, np.zeros((16, 24, 4), np.uint8), r"top: an image must be .*got \(16, 24, 4\)"),
        (TOP, IMAGE[:8], r"top: must be 16x24 .* like the frames before, got 8x24"),
        (TOP, None, r"key 'observation.images.top' is missing, got .*did you mean"),
        (STATE, np.array([0.0, np.nan, 1]), r"observation.state: entry 1 is not finite, got nan"),
        (STATE, np.zeros(4), r"observation.state: must have 3 entries .*got 4; keep one robot"),
        (STATE, np.zeros((1, 3)), r"observation.state: must be a vector .*got \(1, 3\) float64"),
        (STATE, np.array(["a"] * 3), r"observation.state: must be a vector of real numbers"),
        (STATE, None, r"key 'observation.state' is missing"),
        ("task", None, r"key 'task' is missing"),
        ("task", " ", r"task: must be the instruction as text, got ' '"),
        ("task", 3, r"task: must be the instruction as text, got 3"),
    ],
)
def test_wrong_observations_name_frame_and_key(
    tmp_path: Path, observe: Observe, key: str, value: object, message: str
) -> None:
    with (
        pytest.raises(QuantVLAError, match=f"set episode 0 frame 1[ :].*{message}"),
        Recorder(tmp_path / "set") as recorder,
    ):
        recorder.add(observe(), episode=0, frame=0)
        recorder.add(broken(observe(), key, value), episode=0, frame=1)
    assert list(tmp_path.iterdir()) == []


def test_first_frame_without_camera_or_with_a_strange_key(tmp_path: Path, observe: Observe) -> None:
    blind = {STATE: np.zeros(3), "task": "t"}
    with pytest.raises(
        QuantVLAError, match=r"frame 0: no camera image, got keys observation.state"
    ):
        record([(blind, 0, 0)], tmp_path / "set")
    with pytest.raises(QuantVLAError, match="a camera key may hold letters"):
        record([({**observe(), "observation.images./x": IMAGE}, 0, 0)], tmp_path / "set")


def test_a_given_robot_is_binding(tmp_path: Path, observe: Observe) -> None:
    robot = RobotSpec(
        cameras=(CameraSpec(key=TOP, height=16, width=24),),
        state=VectorSpec(key=STATE, dim=3, names=("x", "y", "z")),
        action=VectorSpec(key="action", dim=2),
    )
    frames = [(observe(e, f), e, f) for e in range(2) for f in range(3)]
    opened = record(frames, tmp_path / "set", robot=robot)
    assert opened.robot == robot
    assert WRIST not in opened[0].observation


def test_adding_outside_the_block(tmp_path: Path, observe: Observe) -> None:
    with pytest.raises(QuantVLAError, match="is not being recorded; use `with Recorder"):
        Recorder(tmp_path / "set").add(observe(), episode=0, frame=0)
