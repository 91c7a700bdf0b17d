"""What one server takes on: sizes, numbers and times."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one server takes on. Each client has one request under way; the next is not read before.

    receive_s: from the first fragment of a message to its last, and the longest silence to a ping;
    max_wait_s: from a request's arrival to its turn; grace_s: for requests under way at shutdown;
    stall_s: a single inference after which ``/health`` says so.
    """

    max_message_bytes: int = 16 << 20
    max_clients: int = 16
    receive_s: float = 10.0
    max_wait_s: float = 5.0
    grace_s: float = 10.0
    stall_s: float = 30.0
