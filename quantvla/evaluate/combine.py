"""Arms that were evaluated apart, put together: what they did on the episodes that all of them ran."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from pathlib import Path

from quantvla.evaluate.journal import EpisodeRecord, Header, read_journal
from quantvla.runtime.errors import explain

_SHARED = ("quantvla", "simulator", "seed", "execute", "perturbation", "denoise_steps")


def join_journals(paths: Sequence[Path]) -> tuple[EpisodeRecord, ...]:
    """Return the episodes that every journal has, each with the outcomes of all arms, in order.

    Raises `QuantVLAError` for journals of different evaluations (seed, perturbation, ...) or with
    an arm's name in two of them: their episodes are no pairs.
    """
    journals = [(path, *read_journal(path)) for path in paths]
    first_path, first_header, _ = journals[0]
    names: set[str] = set()
    for path, header, _ in journals:
        _check_same(first_path, first_header, path, header)
        if twice := names & header.arms.keys():
            raise explain(path, "has an arm of an earlier journal", got=", ".join(sorted(twice)),
                          remedy="give every arm its own name")  # fmt: skip
        names |= header.arms.keys()
    by_episode = [{(r.task, r.episode): r for r in records} for _, _, records in journals]
    common = [key for key in by_episode[0] if all(key in found for found in by_episode)]
    return tuple(reduce(_join, (found[key] for found in by_episode)) for key in sorted(common))


def _join(a: EpisodeRecord, b: EpisodeRecord) -> EpisodeRecord:
    return EpisodeRecord(
        task=a.task,
        episode=a.episode,
        environment_seed=a.environment_seed,
        outcomes={**a.outcomes, **b.outcomes},
    )


def _check_same(first_path: Path, first: Header, path: Path, header: Header) -> None:
    for field in _SHARED:
        expected, found = getattr(first, field), getattr(header, field)
        if expected != found:
            raise explain(
                path,
                f"is of another evaluation than {first_path}: {field} expected {expected}",
                got=found,
                remedy="evaluate both arms alike",
            )
