"""``quantvla serve``: an engine behind the openpi websocket protocol."""

from __future__ import annotations

import asyncio
import logging
import signal
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.logging import RichHandler

from quantvla import __version__
from quantvla.cli.options import DIRECTORY
from quantvla.runtime.errors import explain
from quantvla.runtime.manifest import read_manifest
from quantvla.runtime.policy import Policy
from quantvla.runtime.serve.access import Access, read_key
from quantvla.runtime.serve.limits import Limits
from quantvla.runtime.serve.request import RequestReader
from quantvla.runtime.serve.server import PolicyServer

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("engine", type=DIRECTORY)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Others than loopback need a key."
)
@click.option("--port", default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--api-key", envvar="QUANTVLA_API_KEY", help="Other users can see it; see --api-key-file."
)
@click.option("--api-key-file", type=_FILE, help="File with the key that clients must send.")
@click.option("--tls-cert", type=_FILE, help="PEM certificate chain; clients then use wss://.")
@click.option("--tls-key", type=_FILE, help="PEM key of --tls-cert.")
@click.option("--threads", type=int, help="Threads per stage.  [default: physical cores]")
@click.option(
    "--rename", multiple=True, metavar="THEIRS=OURS", help="Observation key of the clients."
)
@click.option("--max-clients", default=16, show_default=True)
@click.option("--max-message-mb", default=16.0, show_default=True, help="Size of one request.")
@click.option(
    "--max-wait",
    default=5.0,
    show_default=True,
    help="Seconds after which a waiting request is stale.",
)
@click.option("-v", "--verbose", is_flag=True, help="Log every connection.")
def serve(
    engine: Path,
    host: str,
    port: int,
    api_key: str | None,
    api_key_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    threads: int | None,
    rename: tuple[str, ...],
    max_clients: int,
    max_message_mb: float,
    max_wait: float,
    verbose: bool,
) -> None:
    """Serve the ENGINE directory to openpi-client and quantvla's PolicyClient until interrupted."""
    console = Console(stderr=True)
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_path=False)],
    )
    if api_key_file is not None:
        if api_key is not None:
            raise explain(
                "--api-key-file",
                "is given besides --api-key or QUANTVLA_API_KEY",
                remedy="give one key",
            )
        api_key = read_key(api_key_file)
    access = Access(host, port, api_key, tls_cert, tls_key)
    access.ssl_context()
    manifest = read_manifest(engine)
    for option, value in (
        ("--max-message-mb", max_message_mb),
        ("--max-clients", max_clients),
        ("--max-wait", max_wait),
    ):
        if not value > 0:
            raise explain(option, "must be positive", got=value, remedy="change it")
    limits = Limits(int(max_message_mb * (1 << 20)), max_clients, max_wait_s=max_wait)
    server = partial(
        PolicyServer,
        manifest,
        partial(Policy.from_pretrained, engine, threads=threads),
        RequestReader(manifest, _renames(rename)),
        access,
        limits,
        name=f"quantvla {__version__}",
    )
    asyncio.run(_run(server, engine, access, console))


async def _run(make: partial[PolicyServer], engine: Path, access: Access, console: Console) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer what is under way."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    scheme = "ws" if access.tls_cert is None else "wss"

    def listening(port: int, warm: bool) -> None:
        host = f"[{access.host}]" if ":" in access.host else access.host
        who = "without a key" if access.api_key is None else "with the key"
        if warm:
            console.print(f"{scheme}://{host}:{port}: ready for clients {who}", soft_wrap=True)
        else:
            console.print(f"{scheme}://{host}:{port}: loading {engine}", soft_wrap=True)

    await make().run(stop, listening)


def _renames(given: tuple[str, ...]) -> dict[str, str]:
    renames: dict[str, str] = {}
    for theirs, ours in map(_pair, given):
        if theirs in renames:
            raise explain("--rename", "names a key twice", got=repr(theirs), remedy="name it once")
        renames[theirs] = ours
    return renames


def _pair(text: str) -> tuple[str, str]:
    theirs, separator, ours = text.partition("=")
    if not (theirs and separator and ours):
        raise explain("--rename", "expected THEIRS=OURS", got=repr(text), remedy="name both keys")
    return theirs, ours
