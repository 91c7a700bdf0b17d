"""Which addresses may be served, and which keys."""

from __future__ import annotations

from pathlib import Path

import pytest
from served import KEY

from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.serve.access import Access, read_key


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "robot.local", ""])
def test_other_addresses_need_a_key(host: str) -> None:
    with pytest.raises(QuantVLAError, match="so it needs a key"):
        Access(host)
    assert Access(host, api_key=KEY).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_does_not(host: str) -> None:
    assert Access(host).allows(None)


@pytest.mark.parametrize("key", ["", "short", "x" * 16 + " y", "ü" * 20, "x" * 20 + "\n"])
def test_weak_keys_are_refused(key: str) -> None:
    with pytest.raises(QuantVLAError, match="at least 16 printable ASCII"):
        Access(api_key=key)


def test_only_the_key_opens() -> None:
    access = Access(api_key=KEY)
    assert access.allows(f"Api-Key {KEY}") and access.allows(f"api-key {KEY}")
    for header in (None, "", KEY, f"Bearer {KEY}", f"Api-Key {KEY}x", "Api-Key ", "Api-Key \udcff"):
        assert not access.allows(header), header


def test_the_key_is_not_printed() -> None:
    assert KEY not in repr(Access(api_key=KEY))


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(KEY + "\n")
    assert read_key(path) == KEY
    with pytest.raises(QuantVLAError, match="cannot be read as key"):
        read_key(tmp_path / "none")


def test_port_and_tls_are_checked(tmp_path: Path) -> None:
    with pytest.raises(QuantVLAError, match="port: expected 0 to 65535, got 70000"):
        Access(port=70000)
    with pytest.raises(QuantVLAError, match="needs a certificate and its key"):
        Access(tls_cert=tmp_path / "cert.pem")
    (tmp_path / "cert.pem").write_text("nothing")
    with pytest.raises(QuantVLAError, match="cannot be used as certificate"):
        Access(tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "cert.pem").ssl_context()
