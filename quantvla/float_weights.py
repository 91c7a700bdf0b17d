"""The float parameters of a policy while passes change them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


class FloatWeights:
    """Reads parameters in float64 and replaces them by new ones in float32.

    What the running pass changed can be taken back (`undo_`); what corrections changed after
    rounding is left out while the teacher runs (`teacher`).
    """

    def __init__(self, policy: nn.Module) -> None:
        self._policy = policy
        self._before: dict[str, Tensor | None] = {}
        self._uncorrected: dict[str, Tensor | None] = {}
        self.correcting = False

    def get(self, name: str) -> Tensor:
        """Return a copy of the parameter in float64."""
        value = self._read(name)
        assert value is not None, name
        return value.detach().double()

    def has(self, name: str) -> bool:
        """Return whether there is such a parameter (a linear may have no bias)."""
        return self._read(name) is not None

    def put_(self, name: str, value: Tensor) -> None:
        """Replace the parameter, or add it where there was none; its shape may change."""
        before = self._read(name)
        self._before.setdefault(name, before)
        if self.correcting:
            self._uncorrected.setdefault(name, before)
        self._write_(name, nn.Parameter(value.detach().float().contiguous(), requires_grad=False))

    def undo_(self) -> None:
        """Take back everything since the last `commit`."""
        for name, value in self._before.items():
            self._write_(name, value)
            if self.correcting:
                self._uncorrected.pop(name, None)
        self._before.clear()

    def commit(self) -> dict[str, Tensor]:
        """Return what changed since the last commit, by name, and keep it."""
        changed = {name: self._read(name) for name in sorted(self._before)}
        self._before.clear()
        return {name: value.detach() for name, value in changed.items() if value is not None}

    def load_(self, changed: Mapping[str, Tensor]) -> None:
        """Take over what a pass changed, as it was written to a file: parameters are then pages of that file.

        They take no memory of their own, and are the same, to the alignment, in a run that continues.
        """
        for name, value in changed.items():
            self.put_(name, value)
        self._before.clear()

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Put back what corrections changed while the block runs."""
        corrected = {name: self._read(name) for name in self._uncorrected}
        for name, value in self._uncorrected.items():
            self._write_(name, value)
        try:
            yield
        finally:
            for name, value in corrected.items():
                self._write_(name, value)

    def _read(self, name: str) -> Tensor | None:
        module, _, leaf = name.rpartition(".")
        value = getattr(self._policy.get_submodule(module), leaf)
        assert value is None or isinstance(value, Tensor)
        return value

    def _write_(self, name: str, value: Tensor | None) -> None:
        module, _, leaf = name.rpartition(".")
        assert value is None or isinstance(value, nn.Parameter)
        self._policy.get_submodule(module).register_parameter(leaf, value)


def scale_rows(weight: Tensor, factors: Tensor) -> Tensor:
    """Return ``weight`` (out, ...) with every row multiplied by its factor (out,), in float64."""
    return weight.double() * factors.double().view(-1, *[1] * (weight.dim() - 1))
