"""The light client: a `Policy` at a distance, that reconnects and knows when to give up."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from served import serving
from tiny_engine import ACTION_DIM, HORIZON, change_manifest, observation

from quantvla.runtime.control.realtime_chunking import RealTimeChunking
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.guidance import ActionPrefix, Method
from quantvla.runtime.policy import Policy
from quantvla.runtime.serve.access import Access
from quantvla.runtime.serve.client import PolicyClient


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def test_it_is_a_policy_at_a_distance(pristine_engine: Path, policy: Policy) -> None:
    with serving(pristine_engine) as served, PolicyClient(served.uri) as client:
        for tick in range(5):
            np.testing.assert_array_equal(
                client.select_action(observation(tick)), policy.select_action(observation(tick))
            )
        for each in (client, policy):
            each.reset(seed=3)
        np.testing.assert_array_equal(
            client.select_action(observation()), policy.select_action(observation())
        )
        noise = policy.sample_noise(9)
        np.testing.assert_array_equal(
            client.predict_action_chunk(observation(), noise=noise),
            policy.predict_action_chunk(observation(), noise=noise),
        )
        assert client.timing["infer_ms"] > 0
        assert client.metadata.state.names == ("shoulder", "elbow", "wrist")


def test_noise_and_seed_together_are_refused_as_by_the_policy(pristine_engine: Path) -> None:
    with serving(pristine_engine) as served, PolicyClient(served.uri) as client:
        noise = np.zeros(client.metadata.noise_shape, np.float32)
        with pytest.raises(QuantVLAError, match="noise: given together with a seed"):
            client.predict_action_chunk(observation(), noise=noise, seed=1)


@pytest.mark.parametrize("method", ["prefix", "forward"])
def test_real_time_chunking_at_a_distance(
    pristine_engine: Path, policy: Policy, method: Method
) -> None:
    ahead = policy.predict_action_chunk(observation(1), seed=1)[1:]
    with serving(pristine_engine) as served, PolicyClient(served.uri) as client:
        near, far = (RealTimeChunking(each, execute=2, method=method) for each in (policy, client))
        one, other = (
            chunking.predict_action_chunk(
                observation(), inference_delay=1, prev_chunk_left_over=ahead, seed=2
            )
            for chunking in (near, far)
        )
        np.testing.assert_array_equal(one, other)
        assert not np.array_equal(other, client.predict_action_chunk(observation(), seed=2))
        wrong = ActionPrefix(np.ones((2, 7), np.float32), 1)
        with pytest.raises(QuantVLAError, match="expected rows of 2 numbers"):
            client.predict_action_chunk(observation(), prefix=wrong)


def test_jpeg_images_are_smaller_and_nearly_the_same(pristine_engine: Path, policy: Policy) -> None:
    obs = observation()
    for key, value in obs.items():
        if "images" in key:
            obs[key] = np.broadcast_to(np.arange(0, 240, 20, dtype=np.uint8)[None, :, None], value.shape).copy()  # fmt: skip
    with serving(pristine_engine) as served, PolicyClient(served.uri, jpeg_quality=95) as client:
        close = client.predict_action_chunk(obs, seed=0)
    exact = policy.predict_action_chunk(obs, seed=0)
    assert 0 < np.abs(close - exact).max() < 0.05


def test_it_goes_on_after_the_server_was_away(pristine_engine: Path, policy: Policy) -> None:
    access = Access(port=free_port())
    expected = [policy.predict_action_chunk(observation()) for _ in range(3)]
    with serving(pristine_engine, access=access) as served:
        client = PolicyClient(served.uri, timeout_s=20)
        np.testing.assert_array_equal(client.predict_action_chunk(observation()), expected[0])
    with serving(pristine_engine, access=access):
        np.testing.assert_array_equal(client.predict_action_chunk(observation()), expected[1])
        assert client.reconnects == 1
        client._connection.socket.shutdown(socket.SHUT_RDWR)  # the cable is pulled
        np.testing.assert_array_equal(client.predict_action_chunk(observation()), expected[2])
        assert client.reconnects == 2
        client.close()


def test_it_gives_up_in_time_so_that_the_robot_can_hold(pristine_engine: Path) -> None:
    with serving(pristine_engine) as served:
        client = PolicyClient(served.uri, timeout_s=0.5)
    started = time.monotonic()
    with pytest.raises(QuantVLAError, match=r"no answer in time.*hold the robot"):
        client.predict_action_chunk(observation())
    assert time.monotonic() - started < 5


def test_it_gives_up_on_a_server_that_hangs_and_takes_no_late_answer(pristine_engine: Path) -> None:
    gate = threading.Event()

    class Hanging(Policy):
        def predict_action_chunk(self, obs, **given):
            if obs["observation.state"][0] == 1:
                gate.wait(20)
            return super().predict_action_chunk(obs, **given)

    load = lambda: Hanging.from_pretrained(pristine_engine, threads=1)  # noqa: E731
    late = {**observation(), "observation.state": np.ones(3)}
    with serving(pristine_engine, load=load) as served:
        with PolicyClient(served.uri, timeout_s=0.5) as client:
            with pytest.raises(QuantVLAError, match="no answer in time, got TimeoutError"):
                client.predict_action_chunk(late, seed=0)
            gate.set()
            got = client.predict_action_chunk(observation(), seed=0)
        with Policy.from_pretrained(pristine_engine, threads=1) as policy:
            np.testing.assert_array_equal(got, policy.predict_action_chunk(observation(), seed=0))


def test_nobody_there(pristine_engine: Path) -> None:
    with pytest.raises(QuantVLAError, match="no answer in time, got ConnectionRefusedError"):
        PolicyClient(f"ws://127.0.0.1:{free_port()}", connect_s=0.3)


def test_another_engine_after_a_reconnect_is_refused(pristine_engine: Path, engine: Path) -> None:
    change_manifest(engine, recipe="other")
    access = Access(port=free_port())
    with serving(pristine_engine, access=access) as served:
        client = PolicyClient(served.uri)
        assert client.predict_action_chunk(observation()).shape == (HORIZON, ACTION_DIM)
    with (
        serving(engine, access=access),
        pytest.raises(QuantVLAError, match="came back with another engine, got tiny other"),
    ):
        client.predict_action_chunk(observation())


def test_a_request_that_the_server_ends_the_connection_for_is_not_repeated(
    pristine_engine: Path,
) -> None:
    with serving(pristine_engine) as served, PolicyClient(served.uri) as client:
        huge = {**observation(), "log": bytes(17 << 20)}
        with pytest.raises(QuantVLAError, match=r"ended the connection, got .*1009"):
            client.predict_action_chunk(huge)
        assert client.predict_action_chunk(observation()).shape == (HORIZON, ACTION_DIM)
