"""Four functions over any frozen dataclass: to_dict, from_dict, override, digest. Both packages use them."""

import contextlib
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, TypeVar

from index.errors import ConfigError

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dictionaries and lists, ready for JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """Build `kind` from plain values. An unknown key is a ConfigError that names the nearest known one."""
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in fields:
            raise ConfigError(f"{kind.__name__} has no field {name!r}{_suggestion(name, fields)}")
    try:
        return kind(**{name: _convert(hints[name], value) for name, value in values.items()})
    except TypeError as error:
        raise ConfigError(f"{kind.__name__}: {error}") from error


def override(config: T, *assignments: str) -> T:
    """Apply each `path.to.field=value`, the value read as JSON and otherwise as text; then check the whole once.

    So two fields that only fit together, such as `unet.channels` and `unet.blocks`, can change in one go.
    """
    values = to_dict(config)
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"expected key=value, got {assignment!r}")
        *groups, name = path.split(".")
        group = values
        for part in groups:
            if not isinstance(group.get(part), dict):
                raise ConfigError(f"{path!r} names no group of fields {part!r}{_suggestion(part, group)}")
            group = group[part]
        if name not in group:
            raise ConfigError(f"there is no field {path!r}{_suggestion(name, group)}")
        try:
            group[name] = json.loads(text)
        except json.JSONDecodeError:
            group[name] = text
    return from_dict(type(config), values)


def digest(config: Any) -> str:
    """A stable hash of a configuration, for checkpoints and benchmark records."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return blake2b(text.encode(), digest_size=8).hexdigest()


def _convert(hint: Any, value: Any) -> Any:
    """Turn JSON's lists and numbers into the field's own type; refuse what is not of it."""
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_dict(typing.cast(type, hint), value)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(typing.get_args(hint), value)
    if origin is tuple:
        element = typing.get_args(hint)[0]
        items = value if isinstance(value, list | tuple) else [value]  # one item need not stand in brackets
        return tuple(_convert(element, item) for item in items)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"expected one of {', '.join(map(str, typing.get_args(hint)))}, got {value!r}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and not isinstance(value, hint):
        raise ConfigError(f"expected {hint.__name__}, got {value!r}")
    if hint is int and isinstance(value, bool):
        raise ConfigError(f"expected int, got {value!r}")
    return value


def _convert_union(options: tuple[Any, ...], value: Any) -> Any:
    if value is None and type(None) in options:
        return None
    for option in options:
        with contextlib.suppress(ConfigError):
            return _convert(option, value)
    names = ["null" if option is type(None) else getattr(option, "__name__", str(option)) for option in options]
    raise ConfigError(f"expected {' or '.join(names)}, got {value!r}")


def _suggestion(name: str, fields: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, fields, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(fields)}"
