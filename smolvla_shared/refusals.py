"""Refusing what does not fit: both sides, in the same words everywhere."""

from collections.abc import Iterable
from typing import Any


def refuse_differences(
    title: str, rows: Iterable[tuple[str, Any, Any]], asked: str = "command line", found: str = "found", fix: str = ""
) -> None:
    """Raise a ValueError that lists, side by side, every row (name, value asked for, value found) whose values differ.

    title: what the two sides contradict each other about; `asked` and `found` name the sides
    """
    differences = [f"  {name}: {asked} {one}, {found} {other}" for name, one, other in rows if one != other]
    if differences:
        raise ValueError("\n".join([f"{title}:", *differences, *filter(None, [fix])]))
