"""The server with the unmodified openpi client, over HTTP, with a key, with TLS, with several clients."""

from __future__ import annotations

import logging
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import trustme
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from served import KEY, raw_websocket, serving
from tiny_engine import ACTION_DIM, CAMERAS, HORIZON, observation
from websockets.exceptions import InvalidStatus

from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.policy import Policy
from quantvla.runtime.serve.access import Access
from quantvla.runtime.serve.client import PolicyClient
from quantvla.runtime.serve.limits import Limits


def openpi_observation(seed: int) -> dict[str, object]:
    """The tiny engine's observation under the names that openpi's examples use."""
    ours = observation(seed)
    return {
        "observation/images/front": ours[CAMERAS[0]],
        "observation/images/wrist": ours[CAMERAS[1]],
        "observation/state": ours["observation.state"],
        "prompt": ours["task"],
    }


def openpi(port: int, key: str | None = None) -> WebsocketClientPolicy:
    return WebsocketClientPolicy("127.0.0.1", port, key)


def test_openpi_client_gets_the_actions_of_the_policy(
    pristine_engine: Path, policy: Policy
) -> None:
    with serving(pristine_engine) as served:
        client = openpi(served.port)
        metadata = client.get_server_metadata()
        assert metadata["action"]["horizon"] == HORIZON and metadata["action"]["execute"] == 3
        assert [camera["key"] for camera in metadata["cameras"]] == list(CAMERAS)
        for seed in range(3):
            reply = client.infer(openpi_observation(seed))
            expected = policy.predict_action_chunk(observation(seed))
            np.testing.assert_array_equal(reply["actions"], expected)
        timing = reply["server_timing"]
        assert timing.keys() == {"infer_ms", "queue_ms", "decode_ms", "prev_total_ms"}
        assert timing["prev_total_ms"] >= timing["infer_ms"] * 0.1 > 0


def test_seed_and_noise_of_one_request(pristine_engine: Path, policy: Policy) -> None:
    noise = policy.sample_noise(5)
    with serving(pristine_engine) as served:
        client = openpi(served.port)
        by_seed = client.infer({**observation(), "seed": 5})["actions"]
        by_noise = client.infer({**observation(), "noise": noise})["actions"]
    np.testing.assert_array_equal(by_seed, policy.predict_action_chunk(observation(), seed=5))
    np.testing.assert_array_equal(by_noise, by_seed)


def test_a_bad_observation_is_an_error_in_words_and_the_next_one_works(
    pristine_engine: Path,
) -> None:
    with serving(pristine_engine) as served:
        client = openpi(served.port)
        for change, match in (
            ({CAMERAS[0]: np.zeros((3, 8, 12), np.uint8)}, "CHW uint8"),
            ({"observation.state": np.array([1.0, np.nan, 0.0])}, "NaN or infinity at elbow"),
            ({"observation.images.top": np.zeros((8, 12, 3), np.uint8)}, "unexpected camera"),
            ({"task": 3}, "expected the instruction as str"),
            ({"seed": -1}, "whole number"),
            ({"noise": np.zeros(3, np.float32)}, "noise: expected floats of shape"),
            ({CAMERAS[0]: b"\xff\xd8 no jpeg"}, "do not decode"),
        ):
            with pytest.raises(RuntimeError, match=match):
                client.infer({**observation(), **change})
        assert client.infer(observation())["actions"].shape == (HORIZON, ACTION_DIM)
        assert served.counted("quantvla_requests_total", outcome="bad_request") == 7
        assert served.counted("quantvla_requests_total", outcome="ok") == 1


def test_health_says_loading_until_the_engine_is_warm(pristine_engine: Path) -> None:
    gate = threading.Event()

    def load() -> Policy:
        gate.wait(20)
        return Policy.from_pretrained(pristine_engine, threads=1)

    with serving(pristine_engine, load=load, warm=False) as served, ThreadPoolExecutor() as pool:
        assert served.get("/healthz") == (200, "OK\n")
        assert served.get("/health") == (503, "loading\n")
        assert served.counted("quantvla_warm") == 0
        early = pool.submit(openpi, served.port)  # waits for its metadata frame
        gate.set()
        assert early.result(20).infer(observation())["actions"].shape == (HORIZON, ACTION_DIM)
        assert served.get("/health") == (200, "ready\n")
        assert served.counted("quantvla_warm") == 1
        assert served.counted("quantvla_clients") == 1
        assert served.counted("quantvla_infer_seconds_count") == 1
        assert served.counted("quantvla_received_bytes_total") > 8 * 12 * 3 * 2


def test_an_engine_that_does_not_load_ends_the_server(pristine_engine: Path) -> None:
    def load() -> Policy:
        raise QuantVLAError("engine: broken")

    with pytest.raises(QuantVLAError, match="engine: broken"), serving(pristine_engine, load=load):
        pass


def test_a_taken_port_is_named(pristine_engine: Path) -> None:
    with (
        serving(pristine_engine) as served,
        pytest.raises(QuantVLAError, match="cannot be listened on"),
        serving(pristine_engine, access=Access(port=served.port)),
    ):
        pass


def test_nothing_without_the_key(pristine_engine: Path) -> None:
    with serving(pristine_engine, access=Access(port=0, api_key=KEY)) as served:
        for wrong in (None, "wrong-key-of-right-length", KEY[:-1], KEY + "x"):
            with pytest.raises(InvalidStatus, match="401"):
                openpi(served.port, wrong)
            assert served.get("/metrics", wrong)[0] == 401
        with pytest.raises(QuantVLAError, match=r"refused the connection, got 401 send the header"):
            PolicyClient(served.uri, api_key="wrong-key-of-right-length")
        assert served.get("/healthz")[0] == 200 and served.get("/health")[0] == 200
        text = served.get("/metrics", KEY)[1]
        assert 'quantvla_refused_total{reason="key"} 9.0' in text
        assert "quantvla_infer_seconds_count 0.0" in text  # nobody got an action so far
        assert openpi(served.port, KEY).infer(observation())["actions"].shape == (4, 2)


def test_web_pages_are_turned_away(pristine_engine: Path) -> None:
    with serving(pristine_engine) as served:
        with pytest.raises(AssertionError, match="403"):
            raw_websocket(served.port, "Origin: https://example.org")
        raw_websocket(served.port).close()


def test_tls(pristine_engine: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(cert)
    issued.private_key_pem.write_to_path(key)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    access = Access(port=0, api_key=KEY, tls_cert=cert, tls_key=key)
    with serving(pristine_engine, access=access) as served:
        with PolicyClient(served.uri, api_key=KEY, ssl_context=trusting) as client:
            assert client.predict_action_chunk(observation()).shape == (HORIZON, ACTION_DIM)
        with pytest.raises(QuantVLAError, match="certificate is not trusted, got unable to get"):
            PolicyClient(served.uri, api_key=KEY)


def test_eight_clients_at_once_each_get_their_own_actions(
    pristine_engine: Path, policy: Policy
) -> None:
    expected = [[policy.predict_action_chunk(observation(c), seed=r) for r in range(10)] for c in range(8)]  # fmt: skip

    def client(number: int) -> None:
        connected = openpi(served.port)
        for request in range(10):
            reply = connected.infer({**observation(number), "seed": request})
            np.testing.assert_array_equal(reply["actions"], expected[number][request])

    with serving(pristine_engine) as served, ThreadPoolExecutor(8) as pool:
        list(pool.map(client, range(8)))
        assert served.counted("quantvla_requests_total", outcome="ok") == 80


def test_two_clients_do_not_share_the_noise(pristine_engine: Path, policy: Policy) -> None:
    first, second = (policy.predict_action_chunk(observation()) for _ in range(2))
    with serving(pristine_engine) as served:
        clients = [openpi(served.port), openpi(served.port)]
        for expected in (first, second):
            for client in clients:
                np.testing.assert_array_equal(client.infer(observation())["actions"], expected)


def test_too_many_clients_are_refused_until_one_leaves(pristine_engine: Path) -> None:
    with serving(pristine_engine, limits=Limits(max_clients=1)) as served:
        first = PolicyClient(served.uri)
        with pytest.raises(InvalidStatus, match="503"):
            openpi(served.port)
        with pytest.raises(QuantVLAError, match="503 refused: clients"):
            PolicyClient(served.uri, connect_s=2.0)
        first.close()
        with PolicyClient(served.uri, connect_s=60) as second:
            assert second.predict_action_chunk(observation()).shape == (HORIZON, ACTION_DIM)
        assert served.counted("quantvla_refused_total", reason="clients") >= 2


class SlowPolicy:
    """A policy whose first chunk waits for a gate."""

    def __init__(self, engine: Path, gate: threading.Event) -> None:
        self._policy = Policy.from_pretrained(engine, threads=1)
        self.manifest = self._policy.manifest
        self.started = threading.Event()
        self.chunks = 0
        self._gate = gate

    def predict_action_chunk(self, obs, **given):
        self.chunks += 1
        self.started.set()
        self._gate.wait(20)
        return self._policy.predict_action_chunk(obs, **given)

    def load_step(self) -> None:
        self._policy.load_step()

    def warm_up(self, runs: int = 1) -> None:
        self._policy.warm_up(runs)

    def close(self) -> None:
        self._policy.close()


def test_a_request_that_waited_too_long_gets_no_stale_actions(pristine_engine: Path) -> None:
    gate = threading.Event()
    slow = SlowPolicy(pristine_engine, gate)
    limits = Limits(max_wait_s=0.5, stall_s=0.05)
    with serving(pristine_engine, load=lambda: slow, limits=limits) as served, ThreadPoolExecutor() as pool:  # fmt: skip
        first = pool.submit(openpi(served.port).infer, observation())
        assert slow.started.wait(10)
        second = pool.submit(openpi(served.port).infer, observation())
        while served.counted("quantvla_requests_waiting") < 2:
            pass
        time.sleep(0.7)
        assert served.get("/health") == (503, "stalled\n")
        gate.set()
        assert first.result(20)["actions"].shape == (HORIZON, ACTION_DIM)
        with pytest.raises(RuntimeError, match=r"waited longer than 0.5 s.*observe again"):
            second.result(20)
        assert slow.chunks == 1
        assert served.counted("quantvla_requests_total", outcome="stale") == 1


def test_a_client_that_dies_while_it_waits_costs_no_inference(
    pristine_engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = threading.Event()
    slow = SlowPolicy(pristine_engine, gate)
    with serving(pristine_engine, load=lambda: slow) as served, ThreadPoolExecutor() as pool:
        first = pool.submit(openpi(served.port).infer, observation())
        assert slow.started.wait(10)
        dying = openpi(served.port)
        dying._ws.send(dying._packer.pack(observation()))
        while served.counted("quantvla_requests_waiting") < 2:
            pass
        dying._ws.socket.close()
        while served.counted("quantvla_clients") > 1:
            pass
        gate.set()
        assert first.result(20)["actions"].shape == (HORIZON, ACTION_DIM)
        while served.counted("quantvla_requests_total", outcome="lost") < 1:
            pass
        assert slow.chunks == 1
    assert "left: no close frame" in caplog.text


class FailingPolicy(SlowPolicy):
    """A policy that fails on every second chunk."""

    def predict_action_chunk(self, obs, **given):
        self.chunks += 1
        if self.chunks % 2 == 0:
            raise MemoryError("out of memory")
        return self._policy.predict_action_chunk(obs, **given)


def test_an_engine_that_fails_in_the_middle_is_an_error_for_that_request_only(
    pristine_engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failing = FailingPolicy(pristine_engine, threading.Event())
    with serving(pristine_engine, load=lambda: failing) as served:
        one, other = openpi(served.port), PolicyClient(served.uri)
        for _ in range(2):
            assert one.infer(observation())["actions"].shape == (HORIZON, ACTION_DIM)
            with pytest.raises(
                QuantVLAError, match="the engine failed: MemoryError: out of memory"
            ):
                other.predict_action_chunk(observation())
        assert served.counted("quantvla_requests_total", outcome="failed") == 2
        other.close()
    assert [r.levelno for r in caplog.records if "engine failed" in r.message] == [
        logging.ERROR
    ] * 2
