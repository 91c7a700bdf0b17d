"""Objects that hold something until they are closed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

_Closing = TypeVar("_Closing", bound="Closing")


class Closing(ABC):
    """A ``with`` block of the object itself closes it at its end."""

    @abstractmethod
    def close(self) -> None:
        """Free what is held."""

    def __enter__(self: _Closing) -> _Closing:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
