"""LeRobotDataset v3, written with lerobot's own API and read back through it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from invented_robot import HEIGHT, TOP, WIDTH, WRIST, Observe

from quantvla.calib_sets import Observation, Selection, build_set, open_set
from quantvla.runtime.errors import QuantVLAError

STATE = "observation.state"
EPISODES, FRAMES = 5, 6


def given(observe: Observe) -> list[tuple[Observation, int, int]]:
    """Return what the dataset holds: 5 episodes of 6 frames, two tasks."""
    return [(observe(e, f, f"task {e % 2}"), e, f) for e in range(EPISODES) for f in range(FRAMES)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory that the datasets of this module are copied from."""
    return tmp_path_factory.mktemp("lerobot") / "pick_cubes"


@pytest.fixture
def dataset(
    written: Path, tmp_path: Path, observe: Observe, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Return a fresh copy of a small LeRobotDataset with PNG images."""
    pytest.importorskip("lerobot")
    if not written.exists():
        write(written, observe)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return Path(shutil.copytree(written, tmp_path / "pick_cubes"))


def write(root: Path, observe: Observe, use_videos: bool = False) -> None:
    """Write the frames of ``given`` with lerobot."""
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    image = {
        "dtype": "video" if use_videos else "image",
        "shape": (HEIGHT, WIDTH, 3),
        "names": ["height", "width", "channels"],
    }
    joints = {"dtype": "float32", "shape": (3,), "names": ["x", "y", "z"]}
    features = {
        TOP: image,
        WRIST: image,
        STATE: joints,
        "observation.effort": {**joints, "names": None},
        "action": {"dtype": "float32", "shape": (2,), "names": {"motors": ["a", "b"]}},
    }
    new = LeRobotDataset.create(
        "someone/pick_cubes",
        fps=10,
        features=features,
        root=root,
        use_videos=use_videos,
        rgb_encoder=RGBEncoderConfig(vcodec="h264", crf=10),  # AV1 wants larger pictures
    )
    extra = {"action": np.zeros(2, np.float32), "observation.effort": np.zeros(3, np.float32)}
    episode = 0
    for observation, number, _ in given(observe):
        if number != episode:
            new.save_episode(parallel_encoding=False)
            episode = number
        new.add_frame({**observation, **extra})
    new.save_episode(parallel_encoding=False)
    new.finalize()


def test_pixels_and_states_come_back_exactly(dataset: Path, observe: Observe) -> None:
    opened = open_set(dataset)
    for frame, (observation, episode, number) in zip(opened, given(observe), strict=True):
        assert (frame.episode, frame.frame, frame.task) == (episode, number, observation["task"])
        assert frame.observation.keys() == observation.keys()
        for key in (TOP, WRIST, STATE):
            np.testing.assert_array_equal(frame.observation[key], observation[key])
            assert frame.observation[key].dtype == observation[key].dtype


def test_card_of_a_dataset(dataset: Path) -> None:
    card = open_set(dataset).card
    assert (card.source.kind, card.source.name) == ("lerobot", "pick_cubes")
    assert card.source.ignored == ("observation.effort",)
    assert [(c.key, c.height, c.width) for c in card.robot.cameras] == [
        (TOP, HEIGHT, WIDTH),
        (WRIST, HEIGHT, WIDTH),
    ]
    assert card.robot.state.names == ("x", "y", "z")
    assert card.robot.action is not None
    assert card.robot.action.names == ("a", "b")
    assert card.episodes == {"calibration": (0, 1, 2), "heldout": (3, 4)}
    assert card.checksum == open_set(dataset).checksum


def test_a_split_named_in_the_dataset_is_used(dataset: Path) -> None:
    info = json.loads((dataset / "meta/info.json").read_text())
    info["splits"] = {"train": "0:4", "test": "4:5"}
    (dataset / "meta/info.json").write_text(json.dumps(info))
    card = open_set(dataset).card
    assert card.split.method == "source"
    assert card.episodes["heldout"] == (4,)
    assert open_set(dataset, heldout=[1]).card.episodes["heldout"] == (1,)
    info["splits"] = {"test": "last"}
    (dataset / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(QuantVLAError, match=r"info.json: split 'test' must be 'first:end'"):
        open_set(dataset)


def test_build_from_a_dataset_twice_gives_the_same_bytes(dataset: Path, tmp_path: Path) -> None:
    selection = Selection(frames=9, heldout_frames=4, stride=2)
    first = build_set(open_set(dataset), tmp_path / "a", selection=selection, name="x")
    again = build_set(open_set(dataset), tmp_path / "b", selection=selection, name="x")
    assert first.card == again.card
    assert (len(first.part("calibration")), len(first.part("heldout"))) == (9, 4)


@pytest.mark.slow
def test_video_datasets_are_decoded(
    tmp_path: Path, observe: Observe, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lerobot")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "videos", observe, use_videos=True)
    opened = open_set(tmp_path / "videos")
    for frame, (observation, _, _) in zip(opened, given(observe), strict=True):
        for key in (TOP, WRIST):  # a codec smears colour noise; brightness per row stays
            found, wanted = frame.observation[key], observation[key]
            assert (found.dtype, found.shape) == (np.uint8, wanted.shape)
            error = found.mean(axis=(1, 2)) - wanted.mean(axis=(1, 2))
            assert np.abs(error).max() < 10


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("info", "info.json: is not the info of a LeRobotDataset"),
        ("v2", "info.json: only LeRobotDataset v3 is read, got v2.1; convert it"),
        ("data", "file-000.parquet: needed by episode 0 but missing; copy the dataset again"),
        ("tasks", "lerobot cannot open this dataset"),
        ("truncated", "lerobot cannot open this dataset"),
    ],
)
def test_damaged_datasets(dataset: Path, damage: str, message: str) -> None:
    info = dataset / "meta/info.json"
    data = next((dataset / "data").rglob("*.parquet"))
    if damage == "info":
        info.write_text("{")
    elif damage == "v2":
        info.write_text(info.read_text().replace('"v3.0"', '"v2.1"'))
    elif damage == "data":
        data.unlink()
    elif damage == "tasks":
        (dataset / "meta/tasks.parquet").unlink()
    else:
        data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(QuantVLAError, match=message):
        open_set(dataset)


def test_without_lerobot_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/info.json").write_text('{"codebase_version": "v3.0"}')
    monkeypatch.setitem(sys.modules, "lerobot.datasets.dataset_metadata", None)
    with pytest.raises(QuantVLAError, match=r"needs lerobot .*pip install quantvla\[compile\]"):
        open_set(tmp_path)


def test_importing_and_recording_needs_no_torch_or_lerobot() -> None:
    script = """
import sys
for name in ("torch", "lerobot", "datasets", "onnx", "transformers", "huggingface_hub"):
    sys.modules[name] = None
import quantvla.calib_sets, quantvla.calib_sets.summary, quantvla.cli.calib
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
