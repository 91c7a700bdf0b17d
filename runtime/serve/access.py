"""Who may connect: the addresses a server binds to, the key it asks for, and TLS."""

from __future__ import annotations

import hmac
import ipaddress
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from quantvla.runtime.errors import explain

SCHEME = "Api-Key"
MIN_KEY_LENGTH = 16


@dataclass(frozen=True)
class Access:
    """Where a server listens and whom it lets in; raises `QuantVLAError` if that would be nobody's key.

    Without ``api_key`` only a loopback ``host`` is accepted. ``tls_cert`` and ``tls_key`` are PEM
    files, given together.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def __post_init__(self) -> None:
        if self.api_key is None and not is_loopback(self.host):
            raise explain(
                f"host {self.host}",
                "other machines could move the robot, so it needs a key",
                remedy="pass --api-key-file, or serve on 127.0.0.1 only",
            )
        if self.api_key is not None:
            check_key(self.api_key)
        if not 0 <= self.port < 1 << 16:
            raise explain("port", "expected 0 to 65535", got=self.port, remedy="choose another")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise explain(
                "TLS", "needs a certificate and its key", remedy="pass --tls-cert and --tls-key"
            )

    def allows(self, authorization: str | None) -> bool:
        """Return whether the value of an Authorization header is the right key, in constant time."""
        if self.api_key is None:
            return True
        scheme, _, given = (authorization or "").partition(" ")
        right = hmac.compare_digest(
            given.strip().encode("utf-8", "surrogateescape"), self.api_key.encode()
        )
        return right and scheme.lower() == SCHEME.lower()

    def ssl_context(self) -> ssl.SSLContext | None:
        """Return the server's TLS 1.2+ context, None without a certificate."""
        if self.tls_cert is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.tls_cert, self.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise explain(
                self.tls_cert,
                "cannot be used as certificate",
                got=f"{error} (key {self.tls_key})",
                remedy="give a PEM certificate chain and its unencrypted PEM key",
            ) from error
        return context


def is_loopback(host: str) -> bool:
    """Return whether ``host`` is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_key(path: Path) -> str:
    """Return the key in the file at ``path``, surrounding white space taken off."""
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise explain(path, "cannot be read as key", got=error, remedy="write one line") from error


def check_key(key: str) -> None:
    """Raise `QuantVLAError` for a key that cannot stand in a header or could be guessed."""
    if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
        raise explain(
            "API key",
            f"expected at least {MIN_KEY_LENGTH} printable ASCII characters without spaces",
            got=f"{len(key)} characters",
            remedy="make one with: openssl rand -hex 24",
        )
