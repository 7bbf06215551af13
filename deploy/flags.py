"""The fields of a frozen dataclass as flags and as keys of a TOML file, read in the same way.

    --workers 4 --optimizer adam:lr=1e-3     workers = 4
                                             optimizer = {name = "adam", lr = 1e-3}

A field's annotation says how it is read and its docstring is the help. Flags win over the file. A
field that is a tuple is a flag that may be given several times, and a list in the file.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import operator
import re
import textwrap
import tomllib
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from paramserver.errors import PluginError
from paramserver.registry import Registry

T = TypeVar("T")


class UsageError(Exception):
    """The command line or its file asks for something that does not exist; nothing was done."""


class Parser(argparse.ArgumentParser):
    """argparse with errors that are one line and name what may have been meant."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong; `main` prints it."""
        raise UsageError(message.removeprefix("argument "))

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse ``argv``.

        Raises:
            UsageError: An unknown flag, a value that is missing, or a word too many.
        """
        known, rest = self.parse_known_args(argv)
        if rest:
            self.error(self._what_is(rest[0].partition("=")[0]))
        return known

    def _what_is(self, word: str) -> str:
        if not word.startswith("-"):
            return f"{word!r} is one word too many (see `{self.prog} --help`)"
        flags = [flag for action in self._actions for flag in action.option_strings]
        return f"there is no flag {word}{_meant(word, flags)} (see `{self.prog} --help`)"


class Flags(Generic[T]):
    """Reads objects of one frozen dataclass from a command line and a TOML file."""

    def __init__(
        self,
        cls: type[T],
        plugins: Mapping[object, Registry[Any]],
        *,
        without: Collection[str] = (),
    ) -> None:
        """Read ``cls``; an annotation that is in ``plugins`` is read by that registry.

        Fields named in ``without`` cannot be given, and keep their defaults.
        """
        self._cls, self._plugins = cls, plugins
        fields = dataclasses.fields(typing.cast(Any, cls))
        self._fields = [field for field in fields if field.name not in without]
        self._hints = typing.get_type_hints(cls)

    def parse(
        self,
        argv: Sequence[str],
        parser: Parser,
        base: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda given: {},
    ) -> T:
        """Build the object that ``argv`` and the file in its ``--config`` describe.

        ``base`` returns values for what neither of them says; it is shown what they do say.

        Raises:
            UsageError: An unknown flag, key or plug-in, or a value that is refused.
            SystemExit: ``--help`` was printed.
        """
        docs = field_docs(self._cls)
        own = inspect.get_annotations(self._cls)  # before what it extends
        for field in sorted(self._fields, key=lambda field: field.name not in own):
            flag = "--" + field.name.replace("_", "-")
            is_truth = _without_none(self._hints[field.name])[0] is bool
            how: dict[str, Any] = {"nargs": "?", "const": "true"} if is_truth else {}
            if _of_several(self._hints[field.name]) is not None:
                how = {"action": "append"}
            parser.add_argument(
                *dict.fromkeys((flag, f"--{field.name}")),
                dest=field.name,
                default=argparse.SUPPRESS,
                metavar=self._metavar(self._hints[field.name]),
                **how,
                help=self._help(field, docs.get(field.name, "")),
            )
        written = vars(parser.read(argv))
        given = {
            name: self._read("--" + name.replace("_", "-"), text, self._hints[name])
            for name, text in written.items()
        }
        file = given.get("config")
        if isinstance(file, Path):
            given = {**self._read_file(file), **given}
        try:
            return self._cls(**{**base(given), **given})
        except ValueError as error:
            raise UsageError(str(error)) from error

    def _read_file(self, path: Path) -> dict[str, Any]:
        try:
            with path.open("rb") as file:
                table = tomllib.load(file)
        except OSError as error:
            raise UsageError(f"--config {path} cannot be read: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"--config {path} is not TOML: {error}") from error
        return self._read_table(table, f"{path}")

    def build(self, table: Mapping[str, object], where: str) -> T:
        """Build the object that a table of a TOML file describes.

        Args:
            table: Values by field.
            where: What errors call the table.

        Raises:
            UsageError: An unknown key or plug-in, or a value that is refused.
        """
        try:
            return self._cls(**self._read_table(table, where))
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from error

    def spell(self, field: str, value: object) -> str:
        """Write a value of ``field`` as the command line takes it."""
        registry = self._registry(field)
        if registry is None or value is None:
            return spell_value(value)
        if isinstance(value, tuple | list):
            return " ".join(spell(registry, one) for one in value) or "none"
        return spell(registry, value)

    def describe(self, built: T) -> dict[str, object]:
        """Return all fields of ``built`` in types that JSON has, as `build` takes them."""
        described: dict[str, object] = {}
        for field in self._fields:
            value, registry = getattr(built, field.name), self._registry(field.name)
            if isinstance(value, tuple):
                value = [one if registry is None else registry.describe(one) for one in value]
            elif registry is not None and value is not None:
                value = registry.describe(value)
            described[field.name] = str(value) if isinstance(value, Path) else value
        return described

    def _registry(self, field: str) -> Registry[Any] | None:
        hint = self._hints[field]
        return self._plugins.get(_of_several(hint) or _without_none(hint)[0])

    def _read_table(self, table: Mapping[str, object], where: str) -> dict[str, Any]:
        keys = [field.name for field in self._fields if field.name != "config"]
        for key in table:
            if key not in keys:
                raise UsageError(
                    f"{where}: there is no key {key!r}{_meant(key, keys)} "
                    f"(there are {', '.join(sorted(keys))})"
                )
        return {
            key: self._read(f"{where}: {key}", value, self._hints[key])
            for key, value in table.items()
        }

    def _read(self, where: str, value: object, hint: Any) -> object:
        try:
            return self._value(value, hint)
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from error

    def _value(self, value: object, hint: Any) -> object:
        """Read ``value`` as ``hint`` says; raise `ValueError` with what is expected."""
        if (one := _of_several(hint)) is not None:
            several = value if isinstance(value, list | tuple) else [value]
            return tuple(self._value(each, one) for each in several)
        inner, optional = _without_none(hint)
        if inner in self._plugins:
            registry = self._plugins[inner]
            if optional and value == "none" and all(entry.name != "none" for entry in registry):
                return None
            return _plugin(registry, value)
        if optional and value == "none":
            return None
        if typing.get_origin(inner) is typing.Literal:
            choices = typing.get_args(inner)
            if value not in choices:
                raise ValueError(f"expected {' or '.join(map(str, choices))}, got {value!r}")
            return value
        if inner is bool:
            return _truth(value)
        if inner in (int, float):
            return _number(value, inner)
        if not isinstance(value, str):
            raise ValueError(f"expected a text, got {value!r}")
        return Path(value) if inner is Path else value

    def _metavar(self, hint: Any) -> str:
        inner, _ = _without_none(_of_several(hint) or hint)
        if inner in self._plugins:
            return "NAME:KEY=VALUE,…"
        if typing.get_origin(inner) is typing.Literal:
            return "|".join(map(str, typing.get_args(inner)))
        return {int: "N", float: "X", bool: "true|false", Path: "PATH"}.get(inner, "TEXT")

    def _help(self, field: dataclasses.Field[Any], doc: str) -> str:
        default = field.default
        if default in (None, ()) or default is dataclasses.MISSING:
            text = doc
        else:
            inner, _ = _without_none(self._hints[field.name])
            shown = spell(self._plugins[inner], default) if inner in self._plugins else default
            text = f"{doc} (default: {shown})"
        return re.sub(r"\bNone\b", "none", text).replace("``", "").replace("%", "%%")


def field_docs(cls: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass and of the classes it extends."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, after in zip(body.body, body.body[1:], strict=False):
            match statement, after:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(doc))),
                ):
                    docs[name] = " ".join(doc.split())
    return docs


def spell(registry: Registry[Any], plugin: object) -> str:
    """Write a plug-in as the command line names it, with the keys that are not at their default.

    ``plugin`` is the plug-in, or ``{"name": …, key: value, …}`` as records hold it.
    """
    described = dict(plugin) if isinstance(plugin, Mapping) else registry.describe(plugin)
    name = str(described.pop("name"))
    defaults = registry.parameters(name)
    keys = [
        f"{key}={spell_value(value)}"
        for key, value in described.items()
        if key not in defaults or spell_value(value) != spell_value(defaults[key])
    ]
    return f"{name}:{','.join(keys)}" if keys else name


def spell_value(value: object) -> str:
    """Write a value of a plug-in's key as the command line reads it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):  # a plug-in in a plug-in, as records hold it
        keys = [f"{key}={spell_value(part)}" for key, part in value.items() if key != "name"]
        return f"({value['name']}:{','.join(keys)})"
    if isinstance(value, tuple | list):
        return "/".join(spell_value(part) for part in value)
    return "none" if value is None else str(value)


def _plugin(registry: Registry[Any], value: object) -> object:
    if isinstance(value, str):
        return registry.parse(value)
    if isinstance(value, Mapping):
        return registry.build(value)
    raise PluginError(f'expected "name:key=value" or {{name = …, key = …}}, got {value!r}')


def _truth(value: object) -> bool:
    if value in (True, "true"):
        return True
    if value in (False, "false"):
        return False
    raise ValueError(f"expected true or false, got {value!r}")


def _number(value: object, kind: type[int] | type[float]) -> int | float:
    expected = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"expected {expected}, got {value!r}")
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        raise ValueError(f"expected {expected}, got {value!r}") from None
    if isinstance(value, float) and number != value:
        raise ValueError(f"expected {expected}, got {value!r}")
    return number


def _without_none(hint: Any) -> tuple[Any, bool]:
    """Split ``X | None`` into ``X``, which may be a union itself, and whether None was there."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint, False
    args = typing.get_args(hint)
    others = [arg for arg in args if arg is not type(None)]
    return functools.reduce(operator.or_, others), len(others) < len(args)


def _of_several(hint: Any) -> Any | None:
    """Return ``X`` of ``tuple[X, ...]``, None of anything else."""
    args = typing.get_args(hint)
    is_several = typing.get_origin(hint) is tuple and len(args) == 2 and args[1] is Ellipsis
    return args[0] if is_several else None


def _meant(word: str, words: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {close[0]}?" if close else ""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Names each flag once, on a line of its own, and keeps its help within 100 columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=8, width=96)

    def _format_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], *_: Any, **__: Any
    ) -> str:
        words = [
            f"{action.metavar}{' …' if action.nargs in ('*', '+') else ''}"
            for action in actions
            if not action.option_strings
        ]
        return " ".join(["usage:", self._prog, *words, "[flags]"]) + "\n\n"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        flags = [flag for flag in action.option_strings if "_" not in flag]
        metavar = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
        metavar = f" [{metavar.strip()}]" if action.nargs == "?" else metavar
        return ", ".join(flags) + metavar
