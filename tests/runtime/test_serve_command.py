"""``quantvla serve`` as a process: bad options, signals, and being killed under a client."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from served import KEY
from tiny_engine import CAMERAS, observation

from quantvla.cli.main import main
from quantvla.runtime.policy import Policy
from quantvla.runtime.serve.client import PolicyClient


@contextmanager
def server(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run the command until its engine is warm; yields the process and its port."""
    command = [sys.executable, "-m", "quantvla", "serve", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        while not (lines and "ready" in lines[-1]):
            assert process.stderr is not None
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        found = re.search(r"127\.0\.0\.1:(\d+): ready", lines[-1])
        assert found is not None
        yield process, int(found[1])
    finally:
        process.kill()
        process.wait(20)


def test_killed_server_and_a_client_that_goes_on(pristine_engine: Path, policy: Policy) -> None:
    expected = [policy.predict_action_chunk(observation()) for _ in range(3)]
    with server(pristine_engine, "--port", 0, "--threads", 1) as (process, port):
        client = PolicyClient(f"ws://127.0.0.1:{port}", timeout_s=60)
        np.testing.assert_array_equal(client.predict_action_chunk(observation()), expected[0])
        process.send_signal(signal.SIGKILL)
        assert process.wait(20) == -signal.SIGKILL
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(client.predict_action_chunk, observation())
        with server(pristine_engine, "--port", port, "--threads", 1):
            np.testing.assert_array_equal(waiting.result(60), expected[1])
            np.testing.assert_array_equal(client.predict_action_chunk(observation()), expected[2])
            assert client.reconnects == 1
            client.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_answers_what_is_under_way_and_ends_with_0(
    pristine_engine: Path, number: signal.Signals
) -> None:
    with server(pristine_engine, "--port", 0, "--threads", 1) as (process, port):
        client = PolicyClient(f"ws://127.0.0.1:{port}")
        client._connection.send(b"\x80")  # an empty observation is answered, in words
        process.send_signal(number)
        words = client._connection.recv(timeout=20)
        assert "camera image is missing" in words
        assert process.wait(20) == 0
        with pytest.raises(Exception, match="1001"):
            client._connection.recv(timeout=20)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--host", "0.0.0.0"], "host 0.0.0.0: other machines could move the robot"),
        (["--api-key", "short"], "API key: expected at least 16"),
        (["--api-key-file", "no-such-file"], "no-such-file: cannot be read as key"),
        (["--tls-cert", "cert.pem"], "TLS: needs a certificate and its key"),
        (["--tls-cert", "none.pem", "--tls-key", "none.pem"], "none.pem: cannot be used"),
        (
            ["--api-key", KEY, "--api-key-file", "key"],
            "--api-key-file: is given besides --api-key or QUANTVLA_API_KEY; give one key",
        ),
        (
            ["--rename", f"image={CAMERAS[0]}", "--rename", f"image={CAMERAS[1]}"],
            "--rename: names a key twice, got 'image'",
        ),
        (["--rename", "image"], "--rename: expected THEIRS=OURS, got 'image'"),
        (["--rename", "image=observation.images.frnt"], "did you mean 'observation.images.front'"),
        (["--max-clients", "0"], "--max-clients: must be positive, got 0"),
        (["--max-wait", "-1"], "--max-wait: must be positive, got -1"),
        (["--max-message-mb", "0"], "--max-message-mb: must be positive, got 0"),
        (["--port", "70000"], "port: expected 0 to 65535, got 70000"),
        (["--threads", "0", "--port", "0"], "threads: expected at least 1, got 0"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(
    pristine_engine: Path, arguments: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(pristine_engine), *arguments])
    assert ended.value.code == 2
    assert match in capsys.readouterr().err


def test_what_is_no_engine_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(tmp_path)])
    assert ended.value.code == 2 and "not an engine directory" in capsys.readouterr().err


def test_the_key_can_come_from_the_environment(
    pristine_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTVLA_API_KEY", KEY)
    with server(pristine_engine, "--port", 0, "--threads", 1) as (_, port):
        with pytest.raises(Exception, match="401"):
            PolicyClient(f"ws://127.0.0.1:{port}")
        with PolicyClient(f"ws://127.0.0.1:{port}", api_key=KEY) as client:
            client.predict_action_chunk(observation())
