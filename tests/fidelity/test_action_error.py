"""Paired action errors on chunks with known answers."""

from __future__ import annotations

import numpy as np
import pytest

from quantvla.fidelity.action_error import (
    Gripper,
    action_error,
    find_gripper,
    gripper_flips,
    velocity_error,
)
from quantvla.runtime.manifest import ActionSpec
from quantvla.runtime.processing_steps import FeatureStatistics

ACTION = ActionSpec(horizon=8, execute=4, dim=3)


def chunks(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((20, 8, 3)).astype(np.float32)


def test_equal_chunks_have_no_error() -> None:
    error = action_error(chunks(), chunks(), execute=4, gripper=Gripper(2, 0.0))
    assert error.nrmse == error.max_abs == error.nrmse_executed == error.gripper_flips == 0
    assert error.cosine_min == pytest.approx(1)


def test_a_scaled_policy_keeps_its_direction() -> None:
    error = action_error(1.1 * chunks(), chunks(), execute=4)
    assert error.nrmse == pytest.approx(0.1, rel=1e-5)
    assert error.nrmse_per_dimension == pytest.approx((0.1,) * 3, rel=1e-5)
    assert error.cosine_mean == pytest.approx(1) and error.gripper_flips is None


def test_an_error_in_one_dimension_and_after_the_executed_steps() -> None:
    found = chunks()
    found[:, 5:, 1] += 1
    error = action_error(found, chunks(), execute=4)
    assert error.nrmse_executed == 0 and error.nrmse > 0.1
    assert error.nrmse_per_dimension[0] == error.nrmse_per_dimension[2] == 0
    assert error.nrmse_per_dimension[1] > error.nrmse
    assert error.cosine_min <= error.cosine_p5 <= error.cosine_mean < 1


def test_one_chunk_that_goes_another_way_makes_the_error_and_not_the_median() -> None:
    found = 1.001 * chunks()
    found[3] = -found[3]
    error = action_error(found, chunks(), execute=4)
    assert error.switched == 1 / 20
    assert error.nrmse > 0.3 and error.nrmse_median < 0.002


def test_gripper_flips_are_a_share_of_the_executed_steps() -> None:
    reference = np.zeros((1, 8, 3), np.float32)
    reference[..., 2] = 0.7
    found = reference.copy()
    found[0, 0, 2] = 0.4
    found[0, 7, 2] = -1
    error = action_error(found, reference, execute=4, gripper=Gripper(2, 0.5))
    assert error.gripper_flips == 0.25
    assert gripper_flips(found, reference, Gripper(2, 0.0)) == 1 / 8


def test_a_gripper_at_rest_does_not_flip() -> None:
    noise = 0.02 * chunks()
    assert np.any((noise > 0) != (-noise > 0))
    assert gripper_flips(noise, -noise, Gripper(2, 0.0)) == 0


def test_velocity_errors_are_by_step() -> None:
    reference = np.ones((5, 3, 1, 8, 3), np.float32)
    found = reference.copy()
    found[:, 2] += 0.5
    assert velocity_error(found, reference) == pytest.approx((0, 0, 0.5))


def test_the_gripper_is_found_by_its_name_only() -> None:
    assert find_gripper(("x", "y", "Gripper.pos"), ACTION, None) == Gripper(2, 0.0)
    assert find_gripper(("x", "y", "z"), ACTION, None) is None
    assert find_gripper(("gripper_l", "gripper_r", "z"), ACTION, None) is None
    assert find_gripper((), ACTION, None) is None


def test_the_midpoint_of_the_gripper_is_that_of_its_range() -> None:
    names = ("x", "y", "gripper")
    ranged = FeatureStatistics(mean=(0, 0, 30), std=(1, 1, 10), min=(0, 0, 0), max=(1, 1, 100))
    found = find_gripper(names, ACTION, ranged)
    assert found is not None and found.midpoint == pytest.approx(2)
    without_range = FeatureStatistics(mean=(0, 0, 0.5), std=(1, 1, 2))
    found = find_gripper(names, ACTION, without_range)
    assert found is not None and found.midpoint == pytest.approx(-0.25)
