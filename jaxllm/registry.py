"""Tables "name -> module:attribute", imported on first use. A listed module that does not import
is an error.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, cast


class Registry[T]:
    """A seam of the engine: to add an implementation, write one file and one line in its table."""

    def __init__(self, kind: str, entries: Mapping[str, str]):
        self.kind = kind
        self._entries = dict(entries)

    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def load(self, name: str) -> T:
        """Raises KeyError, with the known names, for an unknown one."""
        if name not in self._entries:
            raise KeyError(
                f"unknown {self.kind} {name!r}; known: {', '.join(sorted(self._entries))}"
            )
        module, _, attribute = self._entries[name].partition(":")
        loaded: Any = getattr(import_module(module), attribute)
        return cast(T, loaded)
