"""Directories that are written whole or not at all, and checksums."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantvla.runtime.errors import explain

_READ_BYTES = 1 << 20


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_tree(directory: Path) -> str:
    """Return one SHA-256 over the relative names and contents of all files below ``directory``."""
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        digest.update(path.relative_to(directory).as_posix().encode() + b"\0")
        digest.update(bytes.fromhex(sha256_file(path)))
    return digest.hexdigest()


def fsync_tree(directory: Path) -> None:
    """Flush every file below ``directory``, and the directories, to the disk."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def atomic_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory that becomes ``target`` only if the block ends without an error.

    The work happens in ``<target>.partial`` beside it, is flushed, and renamed. A failure leaves
    what was at ``target`` before. Raises `QuantVLAError` when ``target`` exists and
    ``overwrite`` is false, or when the disk refuses the data.
    """
    if target.exists() and not overwrite:
        raise explain(target, "already exists", remedy="choose another output or pass --overwrite")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        fsync_tree(partial)
        _replace_directory(partial, target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise explain(
            target, "could not be written", got=error, remedy="free space or choose another disk"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _replace_directory(new: Path, target: Path) -> None:
    """Rename ``new`` to ``target``; an old ``target`` is set aside first and then removed."""
    aside = target.with_name(target.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)
    new.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old content or the new, never a part."""
    with atomic_file(path) as partial:
        partial.write_bytes(data)


@contextmanager
def atomic_file(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Yield the name of a file to write, which becomes ``path`` only if the block ends without an error.

    It is on the disk then, unless ``flush`` is false: for many files that are flushed together (`fsync_tree`).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        if flush:
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise explain(
            path, "could not be written", got=error, remedy="free space or choose another disk"
        ) from error
