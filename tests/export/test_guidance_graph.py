"""Real-time chunking of exported engines against lerobot's and against the true Jacobian."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_observations import random_observation

from quantvla.export.engine import export_engine
from quantvla.float_policy import FloatPolicy
from quantvla.runtime.control.realtime_chunking import RealTimeChunking
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.guidance import ActionPrefix, prefix_weights
from quantvla.runtime.policy import Policy
from quantvla.staged import make_preprocessor, prepare, run_context

LEROBOT_SCHEDULES = {"linear": "LINEAR", "exponential": "EXP", "ones": "ONES", "zeros": "ZEROS"}


@pytest.fixture(scope="module")
def guided_engine(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    output = tmp_path_factory.mktemp("engines") / "guided"
    export_engine(tiny_checkpoint, "cpu", output, guidance=True)
    return output


@pytest.fixture(scope="module")
def guided_integer_engine(tmp_path_factory: pytest.TempPathFactory, tiny_quantized: Path) -> Path:
    output = tmp_path_factory.mktemp("engines") / "guided_w4a8"
    export_engine(tiny_quantized, "cpu", output, guidance=True)
    return output


@pytest.fixture(scope="module")
def float_policy(tiny_checkpoint: Path) -> FloatPolicy:
    return FloatPolicy.from_pretrained(tiny_checkpoint, threads=1)


def lerobot_chunk(
    policy: FloatPolicy, obs: Any, noise: Any, *, schedule: str, delay: int, left_over: Any, overlap: int
) -> Any:  # fmt: skip
    """Return lerobot's own real-time chunk: (horizon, dim) physical units; ``left_over`` normalized."""
    from lerobot.configs import RTCAttentionSchedule
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    model: Any = policy.loaded.policy
    model.config.rtc_config = RTCConfig(
        prefix_attention_schedule=RTCAttentionSchedule[LEROBOT_SCHEDULES[schedule]],
        max_guidance_weight=5.0,
        execution_horizon=overlap,
    )
    model.init_rtc_processor()
    try:
        batch = policy._before(policy._batch(obs))
        chunk = model.predict_action_chunk(
            batch,
            noise=torch.from_numpy(noise),
            inference_delay=delay,
            prev_chunk_left_over=torch.from_numpy(left_over),
        )
    finally:
        model.config.rtc_config = None
        model.init_rtc_processor()
    return np.asarray(policy._after(chunk[0]).detach().numpy(), np.float32)


@pytest.mark.parametrize("schedule", LEROBOT_SCHEDULES)
@pytest.mark.parametrize(("frozen", "end"), [(0, 8), (3, 6), (5, 5), (7, 4), (2, 20)])
def test_weights_are_lerobots(schedule: Any, frozen: int, end: int) -> None:
    from lerobot.configs import RTCAttentionSchedule
    from lerobot.policies.rtc.configuration_rtc import RTCConfig
    from lerobot.policies.rtc.modeling_rtc import RTCProcessor

    config = RTCConfig(prefix_attention_schedule=RTCAttentionSchedule[LEROBOT_SCHEDULES[schedule]])
    expected = RTCProcessor(config).get_prefix_weights(frozen, min(end, 8), 8)
    assert prefix_weights(frozen, end, 8, schedule) == pytest.approx(expected.numpy(), abs=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "exponential"])
def test_the_forward_method_is_lerobots(
    schedule: Any, tiny_float_engine: Path, float_policy: FloatPolicy, tiny_size: Any
) -> None:
    obs = random_observation(tiny_size, 3)
    with Policy.from_pretrained(tiny_float_engine, threads=1) as policy:
        noise = policy.sample_noise(5)
        old = policy.predict_action_chunk(random_observation(tiny_size, 2), seed=1)
        rtc = RealTimeChunking(policy, 4, "forward", schedule, overlap=5, max_weight=5.0)
        chunk = rtc.predict_action_chunk(
            obs, inference_delay=2, prev_chunk_left_over=old[2:], noise=noise
        )
        left_over = policy.postprocessor.normalize(old[2:])
        plain = policy.predict_action_chunk(obs, noise=noise)
    expected = lerobot_chunk(
        float_policy, obs, noise, schedule=schedule, delay=2, left_over=left_over, overlap=5
    )
    assert np.abs(chunk - expected).max() < 1e-4
    assert np.abs(chunk - plain).max() > 1e-2, "guidance did something"


def test_the_graph_gives_velocity_and_the_true_vector_jacobian_product(
    guided_engine: Path, float_policy: FloatPolicy, tiny_size: Any
) -> None:
    loaded = float_policy.loaded
    obs = random_observation(tiny_size, 3)
    context = run_context(loaded, prepare(make_preprocessor(loaded.interface), obs))
    step = loaded.stage("denoise").module
    fixed = [torch.from_numpy(context[name]) for name in ("keys", "values", "prefix_mask")]
    with Policy.from_pretrained(guided_engine, threads=1) as policy:
        policy.load_guidance()
        shape = policy.manifest.sampler.noise_shape
        rng = np.random.default_rng(0)
        x, target = rng.standard_normal((2, *shape)).astype(np.float32)
        weights = prefix_weights(2, 6, shape[1], "linear")[None, :, None]
        session = policy._engine._sessions["denoise_vjp"]  # type: ignore[index]
        out = session.run(
            {**context, "x": x, "timestep": np.float32([0.7]), "guidance_target": target, "guidance_weights": weights}
        )  # fmt: skip
    leaf = torch.from_numpy(x).requires_grad_(True)
    v = step(*fixed, leaf, torch.tensor([0.7]))
    estimate = leaf - 0.7 * v
    error = ((torch.from_numpy(target) - estimate) * torch.from_numpy(weights)).detach()
    (expected,) = torch.autograd.grad(estimate, leaf, error)
    assert np.abs(out["velocity"] - v.detach().numpy()).max() < 1e-4
    assert np.abs(out["guidance_correction"] - expected.numpy()).max() < 1e-4
    assert np.abs(out["guidance_correction"] - error.numpy()).max() > 1e-4, "not the identity"


@pytest.mark.parametrize("method", ["prefix", "forward", "vjp"])
def test_every_method_keeps_the_frozen_rows_near_the_old_chunk(
    method: Any, guided_engine: Path, guided_integer_engine: Path, tiny_size: Any
) -> None:
    obs = random_observation(tiny_size, 3)
    for engine in (guided_engine, guided_integer_engine):
        with Policy.from_pretrained(engine, threads=1) as policy:
            old = policy.predict_action_chunk(random_observation(tiny_size, 2), seed=1)
            plain = policy.predict_action_chunk(obs, seed=5)
            prefix = ActionPrefix(old[2:], frozen=4, method=method)
            chunk = policy.predict_action_chunk(obs, seed=5, prefix=prefix)
        before = np.abs(plain[:4] - old[2:6]).mean()
        assert np.abs(chunk[:4] - old[2:6]).mean() < 0.2 * before


def test_an_engine_without_the_graph_says_so(tiny_float_engine: Path) -> None:
    with Policy.from_pretrained(tiny_float_engine, threads=1) as policy:
        with pytest.raises(QuantVLAError, match="has no graph for guidance 'vjp'; export it with"):
            policy.load_guidance()
        assert policy.manifest.guidance is None
