"""Refusing what does not fit: both sides in the same words everywhere, and JSON read strictly into dataclasses."""

import json
import math
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from smolvla_shared import ranges


def refuse_differences(
    title: str, rows: Iterable[tuple[str, Any, Any]], asked: str = "command line", found: str = "found", fix: str = ""
) -> None:
    """Raise a ValueError that lists, side by side, every row (name, value asked for, value found) whose values differ.

    title: what the two sides contradict each other about; `asked` and `found` name the sides
    """
    differences = [f"  {name}: {asked} {one}, {found} {other}" for name, one, other in rows if one != other]
    if differences:
        raise ValueError("\n".join([f"{title}:", *differences, *filter(None, [fix])]))


def from_json(text: str | bytes) -> Any:
    """A JSON value. Raises ValueError for what is not JSON, and for an object with a key twice: Python would take the
    last of its two values, others the first.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"an object has the key {shown(key)} twice")
        found[key] = value
    return found


def parse_json(text: str | bytes, where: Any) -> Any:
    """A JSON value of a file. Raises ValueError, with `where`, for what from_json refuses."""
    try:
        return from_json(text)
    except (ValueError, RecursionError) as error:  # not JSON, or not text
        raise ValueError(
            f"{where} is not JSON ({error}): it is damaged or was edited, write or copy it again"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, with the path, for everything else that may be there."""
    if path.is_fifo() or path.is_socket() or path.is_char_device():  # reading would wait for somebody to write
        raise ValueError(f"{path} is no file: write or copy it again")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    value = parse_json(text, path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object, it holds {shown(value)}")
    return value


def refuse_schema(path: Path, body: dict[str, Any], schema: str) -> None:
    """Raise ValueError unless the JSON object of a file names this schema."""
    if (found := body.get("schema_version")) != schema:
        raise ValueError(f"{path}: schema_version is {found!r}, this version reads {schema!r}: write it again")


# Metadata of a dataclass field that files written before it was added lack. `decode` fills in its default.
ADDED_LATER = {"added later": True}


def decode[T](cls: type[T], values: Any, where: str) -> T:
    """A dataclass from JSON values: every field must be there, no other, and each of its type.

    A field with a default is not filled in, unless it is ADDED_LATER, and no value is converted, but for an integer
    that is a float's. Raises ValueError that lists everything wrong, each with its place, or that the dataclass itself
    raises.
    """
    problems: list[str] = []
    try:
        decoded = _decode(cls, values, "", problems)
    except ValueError as error:  # of the dataclass itself
        raise ValueError(f"{where}: {error}") from error
    if problems:
        raise ValueError(f"{where} does not hold what it should:\n  " + "\n  ".join(problems))
    return decoded


def decode_known[T](cls: type[T], values: Any, where: str) -> T:
    """As decode, of an object that may hold more than this dataclass."""
    names = {field.name for field in fields(cls)}
    known = {name: value for name, value in values.items() if name in names} if isinstance(values, dict) else values
    return decode(cls, known, where)


def _decode(kind: Any, value: Any, at: str, problems: list[str]) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        decoded, before = _decode(arguments[0], value, at, problems), len(problems)
        if len(problems) == before and isinstance(decoded, int | float):
            problems += [f"{at}: expected {text}" for text in ranges.out_of_range(kind, decoded)]
        return decoded
    if is_dataclass(kind):
        return _decode_fields(kind, value, at, problems)
    if origin in (Union, UnionType):  # X | None, X | Y
        if value is None and type(None) in arguments:
            return None
        kinds = [argument for argument in arguments if argument is not type(None)]
        # Of several dataclasses, that of the mode which the value names.
        mode = value.get("mode") if isinstance(value, dict) else None
        kind = next((kind for kind in kinds[1:] if kind.mode == mode), kinds[0])
        return _decode(kind, value, at, problems)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{at}: expected a number, found {value}")
    if origin is tuple and isinstance(value, list) and arguments[-1] is ...:
        return tuple(_decode(arguments[0], item, f"{at}[{index}]", problems) for index, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _decode(arguments[1], item, f"{at}.{key}" if at else key, problems) for key, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    is_right = value in arguments if origin is Literal else kind is Any or type(value) is kind
    if not is_right:
        expected = "one of " + ", ".join(map(repr, arguments)) if origin is Literal else _in_words(kind)
        problems.append(f"{at}: expected {expected}, found {shown(value)}")
    return value


def _decode_fields(cls: Any, value: Any, at: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{at or 'the whole'}: expected an object, found {shown(value)}")
        return None
    hints, prefix, before = get_type_hints(cls, include_extras=True), f"{at}." if at else "", len(problems)
    later = {field.name for field in fields(cls) if field.metadata == ADDED_LATER}
    problems += [f"{prefix}{name}: missing" for name in hints if name not in value and name not in later]
    problems += [f"{prefix}{name}: unknown; there are {', '.join(hints)}" for name in value if name not in hints]
    found = {name: _decode(hint, value[name], prefix + name, problems) for name, hint in hints.items() if name in value}
    return None if len(problems) > before else cls(**found)


def _in_words(kind: Any) -> str:
    words = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    return words.get(kind) or {tuple: "a list", dict: "an object"}.get(get_origin(kind), str(kind))


def shown(value: Any) -> str:
    """A value as JSON, cut to what fits a message."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
