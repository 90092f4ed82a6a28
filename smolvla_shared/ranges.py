"""The range of every number, stated in its type: `steps: Count` takes 1 and more, on the command line and in files."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

# What no model reaches: a number above it would ask for more memory than there is before anything else is refused.
MAX_LAYERS, MAX_SIZE = 1000, 10**7
MOST = 10**12  # of anything that is counted


@dataclass(frozen=True)
class Range:
    """Which numbers a field takes, as metadata of its type: Annotated[int, Range(ge=1)]. NaN is in no range."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    finite: bool = True

    def __contains__(self, value: float) -> bool:
        low = (self.ge is None or value >= self.ge) and (self.gt is None or value > self.gt)
        high = (self.le is None or value <= self.le) and (self.lt is None or value < self.lt)
        return low and high and (math.isfinite(value) if self.finite else not math.isnan(value))

    def __str__(self) -> str:
        words = {"at least": self.ge, "above": self.gt, "at most": self.le, "below": self.lt}
        said = [f"{word} {bound:,}" for word, bound in words.items() if bound is not None]
        return " and ".join(said or ["finite"])


Count = Annotated[int, Range(ge=1)]
CountOrNone = Annotated[int, Range(ge=0)]  # 0: none of them
Processes = Annotated[int, Range(ge=1, le=1024)]
ProcessesOrNone = Annotated[int, Range(ge=0, le=1024)]
Pairs = Annotated[int, Range(ge=2)]
Rate = Annotated[float, Range(gt=0, le=10)]  # of learning
Positive = Annotated[float, Range(gt=0)]
Norm = Annotated[float, Range(ge=1e-6, finite=False)]
NotNegative = Annotated[float, Range(ge=0)]
Share = Annotated[float, Range(ge=0, le=1)]
ShareOfSome = Annotated[float, Range(gt=0, lt=1)]
ShareBelowOne = Annotated[float, Range(ge=0, lt=1)]
ShareOfHalf = Annotated[float, Range(ge=0, le=0.5)]
Percent = Annotated[float, Range(ge=0, le=100)]
Brightness = Annotated[float, Range(ge=0, le=255)]  # of a pixel
Seed = Annotated[int, Range(ge=0, lt=1 << 32)]
Port = Annotated[int, Range(ge=1, lt=1 << 16)]
Layers = Annotated[int, Range(ge=0, le=MAX_LAYERS)]
LayersSome = Annotated[int, Range(ge=1, le=MAX_LAYERS)]
Codes = Annotated[int, Range(ge=2, le=1 << 16)]
Few = Annotated[int, Range(ge=1, le=1000)]
Size = Annotated[int, Range(ge=1, le=1 << 16)]
Width = Annotated[int, Range(ge=0, le=MAX_SIZE)]
SizeOrNone = Annotated[int, Range(ge=0, le=1 << 16)]  # 0: there is no such part


def check(config: Any, prefix: str = "") -> None:
    """Raise ValueError for the numbers of a dataclass that are not in the range of their field's type.

    prefix: of the options that the fields are on the command line, such as "--optim."; "": they are fields of a file
    """
    problems = []
    for name, hint in get_type_hints(type(config), include_extras=True).items():  # a parent's fields, too
        name_said = prefix + (name.replace("_", "-") if prefix else name)
        problems += [f"{name_said} must be {text}" for text in out_of_range(hint, getattr(config, name))]
    if problems:
        raise ValueError("; ".join(problems))


def out_of_range(hint: Any, value: Any) -> list[str]:
    """For every number that is out of the range that its type states: the range, and the number."""
    origin, arguments = get_origin(hint), get_args(hint)
    if value is None:
        return []
    if origin is Annotated:
        ranges = [range_ for range_ in hint.__metadata__ if isinstance(range_, Range)]
        if not ranges or not isinstance(value, int | float):
            return out_of_range(arguments[0], value)
        if isinstance(value, int) and value > MOST:
            return [f"at most {MOST:,}, got {value:.3g}" if value < 1e300 else f"at most {MOST:,}"]
        said = "" if math.isfinite(value) else " and finite"
        return [f"{range_}{said * range_.finite}, got {value}" for range_ in ranges if value not in range_]
    if origin in (Union, UnionType):
        return [text for argument in arguments for text in out_of_range(argument, value)]
    if origin is tuple:
        hints = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return [text for one, item in zip(hints, value) for text in out_of_range(one, item)]
    return []


def stated(config: Any, names: str, prefix: str = "--") -> str:
    """Those of these fields that are not their defaults, as options with their values: "--a 3, --b 0.5"."""
    defaults = {field.name: field.default for field in fields(config)}
    values = {name: getattr(config, name) for name in names.split() if getattr(config, name) != defaults[name]}
    given = {name: " ".join(map(str, v)) if isinstance(v, tuple) else v for name, v in values.items()}
    return ", ".join(f"{prefix}{name.replace('_', '-')} {value}" for name, value in given.items())


def refuse_without(config: Any, is_there: bool, what: str, names: str, prefix: str = "--") -> None:
    """Raise ValueError if one of these fields is stated although `what`, which alone reads it, is absent."""
    if not is_there and (options := stated(config, names, prefix)):
        raise ValueError(f"{options} has no effect without {what}: pass that, too, or leave it out")


def refuse_beside(config: Any, what: str, names: str, prefix: str = "--") -> None:
    """Raise ValueError if one of these fields is stated beside `what`, which stands for them."""
    if stated := [f"{prefix}{name.replace('_', '-')}" for name in names.split() if getattr(config, name)]:
        raise ValueError(f"{what} takes the place of {', '.join(stated)}: drop one of them")


def refuse_twice(what: str, names: Iterable[Any]) -> None:
    """Raise ValueError for a name that is given twice."""
    counts = Counter(map(str, names))
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"{what} names {', '.join(twice)} twice: name it once")


def check_sizes(what: str, value: Any) -> None:
    """Raise ValueError for a number in a nested configuration that no model has: not finite, or larger than MAX_SIZE
    (numbers of layers: MAX_LAYERS).
    """
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            check_sizes(f"{what}.{key}", item)
    elif isinstance(value, int | float):
        most = MAX_LAYERS if what.endswith("layers") else MAX_SIZE
        if not -most <= value <= most:
            raise ValueError(f"{what} must be a number of at most {most:,}, got {value}")
