"""The motion guard: what is sent stays within the limits, whatever the policy wants."""

from __future__ import annotations

import numpy as np
import pytest
from fake_robot import DIM, make_limits

from quantvla.runtime.control.guard import MotionGuard
from quantvla.runtime.control.limits import JointLimits, Limits
from quantvla.runtime.errors import QuantVLAError

RATE_HZ = 50.0
DT = 1 / RATE_HZ


def send(guard: MotionGuard, *values: float, **options: bool) -> list[float]:
    """Send equal values for all joints, a tick each; returns joint 0 of what was let through."""
    sent = []
    for tick, value in enumerate(values):
        verdict = guard.admit(
            np.full(DIM, value, np.float32), tick=tick, seam=options.get("seam", False) and tick > 0
        )
        assert verdict.action is not None
        sent.append(float(verdict.action[0]))
    return sent


def test_actions_within_the_limits_pass_bit_for_bit() -> None:
    guard = MotionGuard(make_limits(lower=-1.0, upper=1.0, velocity=10.0), RATE_HZ)
    wanted = np.float32([0.1, 0.123456789, 0.2])
    assert [np.float32(v) for v in send(guard, *wanted)] == wanted.tolist()
    assert not guard.counts


def test_position_is_clamped_from_the_first_action_on() -> None:
    guard = MotionGuard(make_limits(lower=-1.0, upper=1.0), RATE_HZ)
    assert send(guard, 3.0, -2.0, 0.5) == [1.0, -1.0, 0.5]
    assert guard.counts == {"position": 2}


def test_velocity_and_acceleration_bound_the_steps() -> None:
    guard = MotionGuard(make_limits(velocity=1.0, acceleration=5.0), RATE_HZ)
    sent = np.array(send(guard, *([0.0] + [1.0] * 30)))
    rates = np.diff(sent) / DT
    assert rates.max() == pytest.approx(1.0, abs=1e-3)
    assert np.diff(rates).max() * RATE_HZ <= 5.0 + 1e-2
    assert {"velocity", "acceleration"} <= set(guard.counts)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_wanted_what_is_sent_stays_within_position_velocity_acceleration(
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    guard = MotionGuard(
        make_limits(lower=-1.0, upper=1.0, velocity=2.0, acceleration=20.0),
        RATE_HZ,
        kill_after=None,
    )
    guard.admit(np.zeros(DIM, np.float32), tick=0, seam=False)
    wanted = rng.normal(0, 3, (300, DIM)).cumsum(axis=0) * rng.choice([0.01, 0.1, 1.0])
    sent = np.array(
        [guard.admit(w.astype(np.float32), tick=i, seam=False).action for i, w in enumerate(wanted)]
    )
    rates = np.diff(np.vstack([np.zeros(DIM), sent]).astype(np.float64), axis=0) / DT
    assert np.abs(sent).max() <= 1.0 + 1e-6
    assert np.abs(rates).max() <= 2.0 + 1e-3
    assert np.abs(np.diff(rates, axis=0)).max() * RATE_HZ <= 20.0 + 1e-1


def test_jerk_is_bounded_where_nothing_stronger_binds() -> None:
    guard = MotionGuard(make_limits(jerk=100.0), RATE_HZ, kill_after=None)
    sent = np.array(send(guard, *([0.0] * 3 + [0.5] * 20)))
    jerk = np.diff(sent, n=3) / DT**3
    assert np.abs(jerk).max() <= 100.0 * 1.01 and guard.counts["jerk"] > 0


def test_an_infinite_or_nan_action_is_never_sent() -> None:
    for mode in ("clamp", "hold"):
        guard = MotionGuard(make_limits(lower=-1.0, upper=1.0), RATE_HZ, mode=mode)
        send(guard, 0.3)
        for bad in (np.nan, np.inf, -np.inf):
            verdict = guard.admit(np.float32([bad, 0.0]), tick=1, seam=False)
            assert verdict.action.tolist() == pytest.approx([0.3, 0.3])
            (cause,) = verdict.interventions
            assert cause.cause == "not finite" and cause.joints == ("j0",)
    guard = MotionGuard(make_limits(), RATE_HZ, mode="stop")
    verdict = guard.admit(np.float32([np.nan, 0.0]), tick=1, seam=False)
    assert verdict.action is None and verdict.stop == "motion guard: not finite"


def test_before_the_first_action_nothing_is_sent() -> None:
    guard = MotionGuard(make_limits(), RATE_HZ)
    assert guard.hold() is None
    assert guard.admit(np.float32([np.nan, 0]), tick=0, seam=False).action is None


def test_hold_repeats_targets_and_zeroes_displacements() -> None:
    joints = (JointLimits(name="dx", relative=True), JointLimits(name="grip"))
    guard = MotionGuard(Limits(joints, "test"), RATE_HZ)
    guard.admit(np.float32([0.5, 0.7]), tick=0, seam=False)
    assert guard.hold().tolist() == pytest.approx([0.0, 0.7])


def test_hold_brakes_within_the_acceleration() -> None:
    guard = MotionGuard(make_limits(acceleration=5.0), RATE_HZ)
    send(guard, *np.cumsum(np.minimum(np.arange(30) * 5.0 * DT, 1.0) * DT))
    held = [float(guard.hold()[0]) for _ in range(20)]
    rates = np.diff(held) / DT
    assert np.abs(np.diff(rates)).max() * RATE_HZ <= 5.0 + 1e-2
    assert rates[0] > 0.5 and rates[-1] == pytest.approx(0.0, abs=1e-6)


def test_a_jump_at_a_seam_is_spread_over_ticks() -> None:
    guard = MotionGuard(make_limits(seam=0.1), RATE_HZ)
    sent = send(guard, 0.0)
    for tick in range(1, 7):
        verdict = guard.admit(np.full(DIM, 0.45, np.float32), tick=tick, seam=tick == 1)
        sent.append(float(verdict.action[0]))
    assert sent == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.45, 0.45])
    assert guard.counts == {"seam": 1}


def test_hold_mode_rejects_instead_of_clamping() -> None:
    guard = MotionGuard(make_limits(velocity=1.0), RATE_HZ, mode="hold")
    assert send(guard, 0.0, 0.01, 5.0, 0.02) == pytest.approx([0.0, 0.01, 0.01, 0.02])


def test_stale_observation_holds() -> None:
    guard = MotionGuard(make_limits(), RATE_HZ)
    send(guard, 0.1)
    verdict = guard.admit(np.float32([0.2, 0.2]), tick=1, seam=False, stale=True)
    assert verdict.action.tolist() == pytest.approx([0.1, 0.1])
    assert [i.cause for i in verdict.interventions] == ["stale observation"]


def test_violations_in_a_row_kill_and_single_ones_do_not() -> None:
    guard = MotionGuard(make_limits(lower=-1.0, upper=1.0), RATE_HZ, kill_after=3)
    wanted = [2.0, 2.0, 0.0, 2.0, 2.0, 2.0]
    stops = [
        guard.admit(np.full(DIM, w, np.float32), tick=i, seam=False).stop
        for i, w in enumerate(wanted)
    ]
    assert stops[:5] == [None] * 5
    assert stops[5] == "motion guard: 3 interventions in a row, last position"


def test_the_measured_pose_is_the_reference_of_the_first_action() -> None:
    joints = tuple(JointLimits(name=f"j{i}", velocity=1.0, state=i) for i in range(DIM))
    guard = MotionGuard(Limits(joints, "test"), RATE_HZ)
    guard.start_at(np.float32([0.5, -0.5, 9.0]))
    verdict = guard.admit(np.float32([1.0, -0.5]), tick=0, seam=False)
    assert verdict.action.tolist() == pytest.approx([0.52, -0.5])
    assert str(verdict.interventions[0]) == "tick 0: velocity: j0 1 -> 0.52"


def test_a_robot_outside_its_limits_is_not_thrown_back() -> None:
    joints = tuple(
        JointLimits(name=f"j{i}", lower=-1.0, upper=1.0, velocity=1.0, state=i) for i in range(DIM)
    )
    guard = MotionGuard(Limits(joints, "test"), RATE_HZ)
    guard.start_at(np.float32([1.5, 0.0]))
    first = guard.admit(np.float32([1.6, 0.0]), tick=0, seam=False).action
    second = guard.admit(np.float32([0.0, 0.0]), tick=1, seam=False).action
    assert first[0] == pytest.approx(1.5) and second[0] == pytest.approx(1.48)


def test_skipped_ticks_count_as_time() -> None:
    guard = MotionGuard(make_limits(velocity=1.0), RATE_HZ)
    send(guard, 0.0)
    verdict = guard.admit(np.float32([1.0, 0.0]), tick=3, seam=False, ticks=3)
    assert verdict.action[0] == pytest.approx(3 * DT)


def test_bad_arguments() -> None:
    with pytest.raises(
        QuantVLAError, match="guard mode: unknown, got 'soft'; known: clamp, hold, stop"
    ):
        MotionGuard(make_limits(), RATE_HZ, mode="soft")  # type: ignore[arg-type]
    with pytest.raises(QuantVLAError, match="action: expected 2 numbers as in test, got shape"):
        MotionGuard(make_limits(), RATE_HZ).admit(np.zeros(3, np.float32), tick=0, seam=False)
