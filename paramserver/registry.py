"""Plug-ins by name: ``name:key=value,key=value``, one syntax for every kind.

A plug-in is a frozen dataclass. Its fields are the keys, their annotations say how a value is read
(``int``, ``float``, ``bool``, ``str``, optional ones, and tuples written ``0.9/0.99``), their
defaults are what `paramserver list` prints. Users register their own the same way, or name one as
``package.module:Class``.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from paramserver.errors import PluginError

T = TypeVar("T")

_COMMA = re.compile(r",(?![^(]*\))")
"""A comma that is not in parentheses."""


@dataclass(frozen=True, slots=True)
class Entry(Generic[T]):
    """One plug-in of a registry."""

    name: str
    factory: type[T]
    source: str
    """The paper or page that defines it; empty if it needs none."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What else there is to know, by what it is about, such as ``memory``."""

    @property
    def summary(self) -> str:
        """First line of the class's docstring."""
        return (self.factory.__doc__ or "").strip().partition("\n")[0]

    def parameters(self) -> dict[str, object]:
        """Keys with their defaults; a key without a default maps to ``...``."""
        out: dict[str, object] = {}
        for key in dataclasses.fields(typing.cast(Any, self.factory)):
            if not key.init:
                continue
            if key.default is not dataclasses.MISSING:
                out[key.name] = key.default
            elif key.default_factory is not dataclasses.MISSING:
                out[key.name] = key.default_factory()
            else:
                out[key.name] = ...
        return out


class Registry(Generic[T]):
    """The plug-ins of one kind, such as ``optimizer``."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, factory: type[T], *, source: str = "", **facts: str) -> None:
        """Add ``factory`` under ``name``; a name that is taken is an error."""
        if name in self._entries:
            raise PluginError(f"{self.kind} {name!r} is registered already")
        self._entries[name] = Entry(name, factory, source, facts)

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(self._entries.values())

    def parameters(self, name: str) -> dict[str, object]:
        """Return the keys of the plug-in ``name`` with their defaults; empty if there is none."""
        entry = self._entries.get(name)
        return {} if entry is None else entry.parameters()

    def name_of(self, plugin: T) -> str:
        """Return the name ``plugin``'s class is registered under, else ``module:Class``."""
        for entry in self._entries.values():
            if entry.factory is type(plugin):
                return entry.name
        return f"{type(plugin).__module__}:{type(plugin).__qualname__}"

    def describe(self, plugin: T) -> dict[str, object]:
        """Return ``{"name": …, key: value, …}``, what a record stores and `build` reads back."""
        fields = dataclasses.fields(typing.cast(Any, plugin))
        keys = {f.name: getattr(plugin, f.name) for f in fields if f.init}
        return {"name": self.name_of(plugin), **keys}

    def parse(self, text: str) -> T:
        """Build the plug-in written ``name:key=value,key=value``.

        Raises:
            PluginError: Unknown name, unknown key, or a value that does not parse or is refused;
                the message lists what is valid.
        """
        name, keys = self._split(text)
        return self.build({"name": name, **keys})

    def build(self, described: Mapping[str, object]) -> T:
        """Build a plug-in from ``{"name": …, key: value, …}``, as TOML and records hold it."""
        if "name" not in described:
            raise PluginError(f"{self.kind} needs a name; there are {self._names()}")
        entry = self._entry(str(described["name"]))
        hints = typing.get_type_hints(entry.factory)
        known = entry.parameters()
        values: dict[str, object] = {}
        for key, value in described.items():
            if key == "name":
                continue
            if key not in known:
                raise PluginError(
                    f"{self.kind} {entry.name!r} has no key {key!r}; it has "
                    f"{', '.join(known) or 'none'}"
                )
            try:
                values[key] = _read(value, hints[key])
            except ValueError as error:
                raise PluginError(f"{self.kind} {entry.name!r}: {key}: {error}") from None
        missing = [k for k, v in known.items() if v is ... and k not in values]
        if missing:
            raise PluginError(f"{self.kind} {entry.name!r} needs {', '.join(missing)}")
        try:
            return self._made(entry, values)
        except ValueError as error:
            raise PluginError(f"{self.kind} {entry.name!r}: {error}") from error

    def _made(self, entry: Entry[T], values: Mapping[str, Any]) -> T:
        return entry.factory(**values)

    def _split(self, text: str) -> tuple[str, dict[str, object]]:
        """Split ``name:k=v,…``; a comma in parentheses is part of a value."""
        name, rest = self._named(text)
        keys: dict[str, object] = {}
        for part in filter(None, _COMMA.split(rest)):
            key, equals, value = part.partition("=")
            if not equals:
                raise PluginError(
                    f"{self.kind} {text!r}: {part!r} is not key=value; write "
                    f"{name}:key=value,key=value"
                )
            keys[key.strip()] = value.strip()
        return name, keys

    def _named(self, text: str) -> tuple[str, str]:
        """Split off the name; ``module:Class:k=v`` names a class outside the registry."""
        name, _, rest = text.partition(":")
        if "." in name or (rest and "=" not in rest.partition(":")[0]):
            attribute, _, rest = rest.partition(":")
            name = f"{name}:{attribute}"
        return name, rest

    def _entry(self, name: str) -> Entry[T]:
        if name in self._entries:
            return self._entries[name]
        module, colon, attribute = name.partition(":")
        if colon:
            return Entry(name, self._load(module, attribute), "")
        close = difflib.get_close_matches(name, self._entries, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise PluginError(f"there is no {self.kind} {name!r}{hint} (there are {self._names()})")

    def _load(self, module: str, attribute: str) -> type[T]:
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise PluginError(f"{self.kind} {module}:{attribute}: {error}") from error
        if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
            raise PluginError(f"{self.kind} {module}:{attribute} is not a dataclass")
        return typing.cast(type[T], found)

    def _names(self) -> str:
        return ", ".join(sorted(self._entries))


def _read(value: object, hint: Any) -> object:
    """Read ``value`` as the annotation ``hint`` says; raise `ValueError` with what is expected."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _read_union(value, args)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{value!r} is not one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        return _read_tuple(value, args)
    if hint is bool:
        return _read_bool(value)
    if hint in (int, float):
        return _read_number(value, hint)
    return str(value) if hint is str else value


def _read_union(value: object, args: tuple[Any, ...]) -> object:
    if type(None) in args and (value is None or value == "none"):
        return None
    errors = []
    for arg in args:
        if arg is type(None):
            continue
        try:
            return _read(value, arg)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError("; ".join(errors))


def _read_tuple(value: object, args: tuple[Any, ...]) -> tuple[object, ...]:
    parts = value.split("/") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        raise ValueError(f"expected values separated by '/', got {value!r}")
    if len(args) == 2 and args[1] is ...:
        return tuple(_read(part, args[0]) for part in parts)
    if len(parts) != len(args):
        raise ValueError(f"expected {len(args)} values separated by '/', got {value!r}")
    return tuple(_read(part, arg) for part, arg in zip(parts, args, strict=True))


def _read_bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError(f"expected true or false, got {value!r}")


def _read_number(value: object, kind: type[int] | type[float]) -> int | float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"expected {kind.__name__}, got {value!r}")
    try:
        number = kind(value)
    except ValueError:
        raise ValueError(f"expected {kind.__name__}, got {value!r}") from None
    if kind is int and isinstance(value, float) and number != value:
        raise ValueError(f"expected int, got {value!r}")
    return number
