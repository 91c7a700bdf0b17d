"""Limits from files, robot descriptions and statistics."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tiny_engine import make_manifest

from quantvla.runtime.control.limits import (
    JointLimits,
    Limits,
    limits_from_manifest,
    limits_schema,
    read_limits,
)
from quantvla.runtime.control.urdf import read_urdf
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.manifest import ActionSpec, VectorSpec
from quantvla.runtime.processing_steps import FeatureStatistics

ROOT = Path(__file__).parents[2]
ACTION = ActionSpec(horizon=4, execute=3, dim=2, names=("pan.pos", "lift.pos"))
URDF = """<robot name="arm">
  <joint name="base" type="fixed"/>
  <joint name="lift" type="revolute"><limit lower="-1.5" upper="0.5" velocity="2" effort="1"/></joint>
  <joint name="pan" type="continuous"><limit velocity="4" effort="1"/></joint>
</robot>"""


def write(path: Path, *joints: dict[str, object]) -> Path:
    path.write_text(json.dumps({"joints": joints}))
    return path


def test_a_limits_file_is_read_in_the_order_of_the_action(tmp_path: Path) -> None:
    path = write(
        tmp_path / "limits.json",
        {"name": "lift.pos", "lower": -1, "upper": 1, "velocity": 2},
        {"name": "pan.pos", "relative": True, "seam": 0.1, "state": 3},
    )
    limits = read_limits(path, ACTION)
    assert [j.name for j in limits.joints] == ["pan.pos", "lift.pos"]
    assert limits.relative.tolist() == [True, False]
    assert limits.bound("velocity", math.inf).tolist() == [math.inf, 2.0]


@pytest.mark.parametrize(
    ("joints", "message"),
    [
        ([{"name": "pan.pos"}], "no limits for lift.pos; add an entry for every joint"),
        ([{"name": "pan.pos"}, {"name": "lift.po"}], "the policy has no such joint, got 'lift.po'; did you mean 'lift.pos'"),
        ([{"name": "pan.pos"}, {"name": "pan.pos"}], "named twice, got 'pan.pos'"),
        ([{"name": "pan.pos", "velocty": 1}], "not a limits file .*unknown field `velocty`"),
        ([{"name": "pan.pos", "velocity": -1}], "not a limits file .*> 0"),
        ([{"name": "pan.pos", "lower": 1, "upper": 1}, {"name": "lift.pos"}], "expected finite lower < upper, got 1"),
        (
            [{"name": "pan.pos", "relative": True, "lower": 0.1}, {"name": "lift.pos"}],
            "a relative command must be allowed to be 0, or the robot cannot hold, got 0.1",
        ),
    ],
)  # fmt: skip
def test_wrong_limits_files_are_refused(
    tmp_path: Path, joints: list[dict[str, object]], message: str
) -> None:
    with pytest.raises(QuantVLAError, match=message):
        read_limits(write(tmp_path / "limits.json", *joints), ACTION)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(QuantVLAError, match="no such file; give a limits file"):
        read_limits(tmp_path / "none.json", ACTION)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(QuantVLAError, match="not a limits file"):
        read_limits(tmp_path / "broken.json", ACTION)


def test_limits_from_statistics_are_the_range_of_the_training_actions_and_a_tenth() -> None:
    manifest = msgspec.structs.replace(
        make_manifest(),
        statistics={"action": FeatureStatistics(min=(-1.0, 2.0), max=(1.0, 3.0))},
    )
    limits = limits_from_manifest(manifest, relative=(True, False))
    assert limits.bound("lower", -np.inf) == pytest.approx([-1.2, 1.9])
    assert limits.bound("upper", np.inf) == pytest.approx([1.2, 3.1])
    assert limits.relative.tolist() == [True, False]
    assert np.isinf(limits.bound("velocity", np.inf)).all()


def test_limits_from_mean_and_deviation_and_from_nothing() -> None:
    limits = limits_from_manifest(make_manifest())
    assert limits.bound("lower", 0)[0] == pytest.approx(10 - 10 - 2)  # five deviations, and a tenth
    bare = msgspec.structs.replace(make_manifest(), statistics={})
    with pytest.raises(QuantVLAError, match="motion guard: the engine's action statistics give no"):
        limits_from_manifest(bare)
    with pytest.raises(QuantVLAError, match="expected 2 flags of relative actions, got 1"):
        limits_from_manifest(make_manifest(), relative=(True,))


def test_the_state_measures_the_joints_of_the_same_name() -> None:
    manifest = msgspec.structs.replace(
        make_manifest(),
        action=msgspec.structs.replace(make_manifest().action, names=("wrist", "other")),
        state=VectorSpec(key="observation.state", dim=3, names=("shoulder", "elbow", "wrist")),
    )
    assert [j.state for j in limits_from_manifest(manifest).joints] == [2, None]


def test_a_relative_command_may_always_be_zero() -> None:
    manifest = msgspec.structs.replace(
        make_manifest(), statistics={"action": FeatureStatistics(min=(5.0, 5.0), max=(6.0, 6.0))}
    )
    limits = limits_from_manifest(manifest, relative=(True, False))
    assert limits.bound("lower", 0) == pytest.approx([0.0, 4.9])


def test_a_urdf_gives_position_and_velocity(tmp_path: Path) -> None:
    path = tmp_path / "arm.urdf"
    path.write_text(URDF)
    pan, lift = read_urdf(path, ACTION).joints
    assert (lift.lower, lift.upper, lift.velocity) == (-1.5, 0.5, 2.0)
    assert (pan.lower, pan.upper, pan.velocity) == (None, None, 4.0)
    degrees = read_urdf(path, ACTION, degrees=True).joints[1]
    assert degrees.lower == pytest.approx(math.degrees(-1.5))


def test_a_urdf_of_another_robot_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "arm.urdf"
    path.write_text(URDF)
    other = msgspec.structs.replace(ACTION, names=("pan.pos", "lft"))
    with pytest.raises(QuantVLAError, match="no moving joint 'lft'; did you mean 'lift'"):
        read_urdf(path, other)
    with pytest.raises(QuantVLAError, match="cannot be matched, since the engine does not know"):
        read_urdf(path, msgspec.structs.replace(ACTION, names=()))
    path.write_text(URDF.replace('lower="-1.5" ', ""))
    with pytest.raises(QuantVLAError, match=r"joint 'lift\.pos': has no position limits"):
        read_urdf(path, ACTION)
    path.write_text(URDF.replace("-1.5", "low"))
    with pytest.raises(QuantVLAError, match="lower is not a number, got low"):
        read_urdf(path, ACTION)
    path.write_text("<robot")
    with pytest.raises(QuantVLAError, match="not a URDF file"):
        read_urdf(path, ACTION)


def test_the_schema_in_the_documentation_is_the_one_that_is_checked() -> None:
    assert (ROOT / "docs" / "limits.schema.json").read_bytes() == limits_schema()
    schema = json.loads(limits_schema())
    assert schema["$defs"]["JointLimits"]["additionalProperties"] is False


def test_limits_are_as_long_as_their_joints() -> None:
    assert Limits((JointLimits(name="a"), JointLimits(name="b")), "test").dim == 2
