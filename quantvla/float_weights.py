"""The float parameters of a policy while passes change them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from quantvla import tensor_file
from quantvla.runtime.files import fsync_tree

ROWS_BYTES = 256 << 20
"""Float64 bytes of a parameter that are changed at a time."""


class FloatWeights:
    """Reads parameters in float64 and replaces them by new ones in float32.

    With a folder (`open_folder`) new ones are written to a file each and are pages of it, so that a policy whose
    parameters all change takes no memory for them, and has the same ones, to the alignment, when a run continues.
    Without one they stay in memory. What the running pass changed can be taken back (`undo_`); what corrections changed
    after rounding is left out while the teacher runs (`teacher`).
    """

    def __init__(self, policy: nn.Module) -> None:
        self._policy = policy
        self._folder: Path | None = None
        self._newest: dict[str, Path] = {}
        self._before: dict[str, Tensor | None] = {}
        self._uncorrected: dict[str, Tensor | None] = {}
        self.correcting = False

    def open_folder(self, folder: Path) -> None:
        """Write what is changed from now on to ``folder``."""
        self._folder = folder

    def get(self, name: str) -> Tensor:
        """Return a copy of the parameter in float64."""
        return self._present(name).double()

    def has(self, name: str) -> bool:
        """Return whether there is such a parameter (a linear may have no bias)."""
        return self._read(name) is not None

    def put_(self, name: str, value: Tensor) -> None:
        """Replace the parameter, or add it where there was none; its shape may change."""
        self._replace_(name, self._kept(name, tuple(value.shape), iter((value,))))

    def change_rows_(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the parameter by ``change`` of its leading rows, (n, ...) float64 each, a few at a time.

        For parameters too large to be in memory twice; ``change`` keeps the shape.
        """
        value = self._present(name)
        size = max(1, ROWS_BYTES // (value[:1].numel() * torch.float64.itemsize))
        parts = (change(rows.double()) for rows in torch.split(value, size))
        self._replace_(name, self._kept(name, tuple(value.shape), parts))

    def undo_(self) -> None:
        """Take back everything since the last `commit`."""
        for name, value in self._before.items():
            self._write_(name, value)
            if self.correcting:
                self._uncorrected.pop(name, None)
        self._before.clear()

    def commit(self) -> None:
        """Keep what changed since the last commit, on the disk if there is a folder."""
        self._before.clear()
        if self._folder is not None and self._folder.is_dir():
            fsync_tree(self._folder)

    def changed(self) -> tuple[str, ...]:
        """Return the names of the parameters in the folder."""
        assert self._folder is not None
        return tuple(sorted(map(tensor_file.name_of, self._folder.glob(f"*{tensor_file.SUFFIX}"))))

    def reopen_(self) -> None:
        """Take over what an earlier run wrote to the folder."""
        self.load_({name: tensor_file.read(self._file(name)) for name in self.changed()})

    def drop_hidden(self) -> None:
        """Remove the files of earlier folders that those of this one replace.

        Not what corrections replace: the teacher still has it.
        """
        for name in () if self.correcting else self.changed():
            path = self._file(name)
            earlier = self._newest.get(name, path)
            if earlier != path:
                earlier.unlink(missing_ok=True)
            self._newest[name] = path

    def load_(self, changed: Mapping[str, Tensor]) -> None:
        """Take over parameters as they are."""
        for name, value in changed.items():
            self._replace_(name, value)
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

    def _kept(self, name: str, shape: tuple[int, ...], parts: Iterator[Tensor]) -> Tensor:
        if self._folder is None:
            found = [part.detach().float() for part in parts]
            return (found[0] if len(found) == 1 else torch.cat(found)).contiguous()
        return tensor_file.write_parts(self._file(name), name, shape, parts)

    def _file(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}{tensor_file.SUFFIX}"

    def _replace_(self, name: str, value: Tensor) -> None:
        before = self._read(name)
        self._before.setdefault(name, before)
        if self.correcting:
            self._uncorrected.setdefault(name, before)
        self._write_(name, nn.Parameter(value.detach(), requires_grad=False))

    def _present(self, name: str) -> Tensor:
        value = self._read(name)
        assert value is not None, name
        return value.detach()

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
