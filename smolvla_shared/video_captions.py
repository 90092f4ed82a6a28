"""Texts of clips: which files hold them, and which text an episode gets.

A caption is of a whole clip, as Something-Something has them, or of a moment or a stretch of it, as Ego4D has them.
"""

import csv
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolvla_shared.refusals import from_json

# Ego4D has its videos narrated twice, each time by somebody else.
PASSES = "narration_pass_1", "narration_pass_2"
# Who acts, at the beginning of a narration: "#C C opens a door" is the wearer of the camera, "#O a man X ..." another.
WHO = re.compile(r"^\s*#\s*[CO]\b\s*(C\b)?\s*", re.IGNORECASE)
UNSURE = re.compile(r"#\s*unsure\b", re.IGNORECASE)  # in the place of what the narrator could not name


@dataclass(frozen=True, slots=True)
class Caption:
    """A text, and the stretch of its clip that it is of, in seconds. Without a stretch it is of the whole clip."""

    text: str
    start: float = -math.inf
    end: float | None = math.inf  # None: it is of the moment `start`

    @property
    def last(self) -> float:
        return self.start if self.end is None else self.end


def text_of(captions: Iterable[Caption], start: float, end: float) -> str | None:
    """The text of an episode that shows [start, end) seconds of a clip, None if there is none.

    Of the captions that meet the episode, it is the one nearest to the episode's middle, and the later one of equally
    near ones. If none meets it, it is the last one before that is of a moment: such a caption does not say how long it
    holds.
    """
    middle = (start + end) / 2
    if within := [caption for caption in captions if caption.start < end and start <= caption.last]:
        return min(within, key=lambda c: (max(c.start - middle, middle - c.last, 0), -c.start)).text
    before = [caption for caption in captions if caption.end is None and caption.start < start]
    return max(before, key=lambda caption: caption.start).text if before else None


# --- files ------------------------------------------------------------------------------------------------------------


def read_captions(path: Path) -> dict[str, list[Caption]]:
    """Captions by clip name. Raises ValueError for another form."""
    form = (
        f"--captions {path} should be a JSON list of objects, or a CSV file with a header, with `id` and `label`, and "
        "with `start_s` (and perhaps `end_s`), seconds, where the texts are of moments; or Ego4D's narration.json"
    )
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            found = from_json(file.read()) if path.suffix.lower() == ".json" else list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{form}: {error}") from error
    rows = narrations(found, form) if isinstance(found, dict) else found if isinstance(found, list) else [found]
    is_timed = any(isinstance(row, dict) and "start_s" in row for row in rows)
    captions: dict[str, list[Caption]] = {}
    for row in rows:
        caption = caption_of(row, is_timed, form)
        of_clip = captions.setdefault(str(row["id"]), [])
        if not is_timed and of_clip and of_clip != [caption]:
            raise ValueError(
                f"--captions {path} has two texts for {row['id']}: {of_clip[0].text!r} and {caption.text!r}; texts of "
                "moments need a `start_s` each"
            )
        if is_timed or not of_clip:
            of_clip.append(caption)
    return captions


def caption_of(row: Any, is_timed: bool, form: str) -> Caption:
    """Raises ValueError, which begins with `form`, for a row that is no caption."""
    if not isinstance(row, dict) or row.get("id") is None or row.get("label") is None:
        raise ValueError(f"{form}; found {json.dumps(row)[:200]}")
    if not is_timed:
        return Caption(str(row["label"]))
    try:
        start = float(row.get("start_s"))
        end = None if row.get("end_s") in (None, "") else float(row["end_s"])
    except (TypeError, ValueError):
        start, end = math.nan, None
    if not (math.isfinite(start) and (end is None or start <= end < math.inf)):
        raise ValueError(
            f"{form}; every row needs a `start_s`, and no `end_s` before it; found {json.dumps(row)[:200]}"
        )
    return Caption(str(row["label"]), start, end)


def narrations(videos: dict[str, Any], form: str) -> list[dict[str, Any]]:
    """Rows of Ego4D's narration.json, of both passes. Raises ValueError, which begins with `form`, for another object.

    {video: {"narration_pass_1": {"narrations": [{"timestamp_sec": 4.5, "narration_text": "#C C opens a door"}]}}}, or
    this as "videos" of an object (https://ego4d-data.org/docs/data/annotations-schemas).
    """
    videos, rows, unusable = videos.get("videos", videos), [], 0
    if not isinstance(videos, dict):
        raise ValueError(f"{form}; found {json.dumps(videos)[:200]}")
    for video, record in videos.items():
        try:
            if not record.keys() & {*PASSES, "status"}:  # a video without narrations has its status alone
                raise KeyError(PASSES[0])
            for narration in [one for name in PASSES for one in record.get(name, {}).get("narrations", [])]:
                text, start = narration["narration_text"], narration["timestamp_sec"]
                text = UNSURE.sub("something", WHO.sub("", text or "")).strip()
                if text and start is not None:
                    rows.append({"id": video, "label": text, "start_s": start})
                else:
                    unusable += 1
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{form}; found {json.dumps({video: record})[:200]}") from error
    if unusable:
        print(f"{unusable} of {unusable + len(rows)} narrations have no text or no time and are not read")
    return rows
