"""Command-line flags made from a dataclass: one definition of names, types, defaults and help."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Collection
from difflib import get_close_matches
from typing import Any, NoReturn, override


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, names the flag that was perhaps meant, exits with 2."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    @override
    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """Unknown flags end it here, in the subcommand's own parser, which knows similar ones."""
        known, unknown = super().parse_known_args(*args, **kwargs)
        if unknown:
            flag = unknown[0].partition("=")[0]
            close = get_close_matches(flag, self._option_string_actions, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            self.error(f"unknown parameter {flag}{hint}")
        return known, unknown

    @override
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}. See {self.prog} --help\n")


def add_flags(
    parser: argparse.ArgumentParser, title: str, cls: type, *, skip: Collection[str] = ()
) -> None:
    """One flag per field that has help: ``max_model_len`` is --max-model-len, or what the field's
    metadata calls "flag"; a bool is --x and --no-x; a tuple takes several values and repetition.
    """
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in skip or "help" not in field.metadata:
            continue
        name = "--" + (field.metadata.get("flag") or field.name.replace("_", "-"))
        help_text = field.metadata["help"]
        if field.default not in (None, ()):
            help_text += f" (default: {field.default})"
        options: dict[str, Any] = {
            "dest": field.name,
            "default": field.default,
            "help": help_text.replace("%", "%%"),
        }
        kind = _plain_type(hints[field.name])
        if kind is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, **options)
            continue
        choices = field.metadata.get("choices")
        options["metavar"] = None if choices else kind.__name__.upper()
        if field.default == ():
            options |= {"nargs": "+", "action": "extend", "default": []}
        group.add_argument(name, type=kind, choices=choices, **options)


def from_flags[T](cls: type[T], args: argparse.Namespace, **overrides: Any) -> T:
    """The dataclass that the flags of ``add_flags`` describe."""
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(args).items()
        if name in _flag_names(cls)
    }
    return cls(**(given | overrides))


def _flag_names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls) if "help" in field.metadata}


def _plain_type(hint: Any) -> type:
    """``int`` of ``int | None`` and of ``tuple[int, ...]``."""
    if isinstance(hint, types.UnionType):
        (hint,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
