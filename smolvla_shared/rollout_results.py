"""What a rollout leaves in its directory: episodes as they end, results, tables, videos and a contact sheet.

settings.json      what the episodes are a function of; --resume refuses any other
episodes.jsonl     a line per episode, on disk before the next one ends: a killed rollout loses none and repeats none
results.json       written last: success by task and pooled, and every episode
contact_sheet.png  some failures and successes of each task, made of strips/, which has one of every episode
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from smolvla_shared.comparison import wilson_interval
from smolvla_shared.files import new_directory, replacing, write_text
from smolvla_shared.locks import HELD, LOCK_FILE, lock, unlock
from smolvla_shared.refusals import decode, parse_json, read_json, refuse_differences
from smolvla_shared.rollouts import Episode
from smolvla_shared.video_source import read_image

SUCCESS_COLOR, FAILURE_COLOR = (40, 160, 60), (200, 50, 40)
SHEET_COLUMNS, SHEET_ROWS = 8, 24  # frames of an episode in the contact sheet, and episodes
SETTINGS_FILE, EPISODES_FILE, RESULTS_FILE = "settings.json", "episodes.jsonl", "results.json"
Videos = Literal["all", "failures", "none"]


def open_directory(directory: Path, settings: dict[str, Any]) -> list[Episode]:
    """Claim a directory for episodes of these settings, or go on with it: the episodes that are there already. It is
    kept to this process until `finish`.

    Raises ValueError if another process writes there, if it belongs to other settings, and for episodes that are not
    what was written.
    """
    if not directory.exists():
        with new_directory(directory) as filled:
            write_text(filled / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
            (filled / EPISODES_FILE).touch()
    for needed in (SETTINGS_FILE, EPISODES_FILE):
        if not (directory / needed).is_file():
            raise ValueError(f"--resume: {directory} holds no rollout ({needed} is missing); name another directory")
    found = read_json(directory / SETTINGS_FILE)
    refuse_differences(
        f"--resume: {directory} holds a rollout with other settings",
        [(key, settings.get(key), found.get(key)) for key in settings | found],
        found="there",
        fix="Name another directory",
    )
    lock(directory, f"--out {directory}", "wait for it or stop it, or name another directory")
    path = directory / EPISODES_FILE
    whole, *_ = path.read_bytes().rpartition(b"\n")
    episodes = read_episodes(path, whole, settings)
    with path.open("r+b") as file:  # without the half line of a process that was killed while it wrote
        file.truncate(len(whole) + bool(whole))
    tasks = settings.get("environment", {}).get("tasks") or sorted({episode.task for episode in episodes})
    for episode in on_sheet(in_order(episodes, tasks)):
        read_strip(directory, episode)
    return episodes


@contextmanager
def removed_if_empty(directory: Path) -> Iterator[None]:
    """Leaves no directory behind that was made in this context, unless an episode has ended in it or another process
    writes there: the corrected command makes it again.
    """
    is_new = not directory.exists()
    try:
        yield
    except BaseException:
        is_ours = all(path.resolve() in HELD for path in directory.rglob(LOCK_FILE))
        if is_new and is_ours and not any(path.stat().st_size for path in directory.rglob(EPISODES_FILE)):
            shutil.rmtree(directory, ignore_errors=True)
        raise


def refuse_fewer(directory: Path, episodes: list[Episode], seeds: range) -> None:
    """Raise ValueError if there are episodes that were not asked for: they would be counted, too."""
    if more := [episode for episode in episodes if episode.seed >= seeds.stop]:
        last = max(episode.seed for episode in more)
        raise ValueError(
            f"--resume with --episodes {len(seeds)}: {directory} has episodes up to seed {last}, which would all be "
            f"counted: pass --episodes {last - seeds.start + 1} or more, or name another directory"
        )


def in_order(episodes: list[Episode], tasks: list[str]) -> list[Episode]:
    """By task and seed. The file has an episode that was run again at its end."""
    return sorted(episodes, key=lambda episode: (tasks.index(episode.task), episode.seed))


def read_episodes(path: Path, text: bytes, settings: dict[str, Any]) -> list[Episode]:
    """The episodes of a file's lines. Raises ValueError for one that a rollout of these settings has not written."""
    lines, seen = enumerate(text.split(b"\n") if text else [], 1), set()
    episodes = [decode(Episode, parse_json(line, at := f"{path}, line {number}"), at) for number, line in lines]
    tasks, seed = settings.get("environment", {}).get("tasks"), settings.get("seed", 0)
    for number, episode in enumerate(episodes, 1):
        key = episode.task, episode.seed
        if key in seen or (tasks and episode.task not in tasks) or episode.seed < seed:
            what = "twice" if key in seen else f"but the tasks are {', '.join(tasks or ())}, from seed {seed} on"
            raise ValueError(
                f"{path}, line {number} is of {episode.task}, seed {episode.seed}, {what}: take the line out"
            )
        seen.add(key)
    return episodes


def record(
    directory: Path,
    recorded: list[Episode],
    episodes: Iterable[tuple[Episode, list[np.ndarray]]],
    fps: int,
    videos: Videos,
) -> None:
    """Write each episode as it ends, and append it to `recorded`: its pictures first, then its line."""
    from lerobot.utils.io_utils import write_video

    (directory / "strips").mkdir(exist_ok=True)
    for episode, frames in episodes:
        recorded.append(episode)
        # Of every episode: which of them the sheet shows changes if a line is taken out of the file.
        with replacing(strip_path(directory, episode)) as path:
            film_strip(episode, frames).save(path, format="png")
        if videos == "all" or (videos == "failures" and not episode.success):
            # Small frames are enlarged without smoothing: the video shows what the policy saw.
            scale = max(1, 288 // frames[0].shape[0])
            large = [frame.repeat(scale, axis=0).repeat(scale, axis=1) for frame in frames]
            write_video(directory / f"{name(episode)}.mp4", large, fps)
        with (directory / EPISODES_FILE).open("a") as file:
            file.write(json.dumps(asdict(episode)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def summarize(episodes: list[Episode]) -> dict[str, Any]:
    """Success rate with its 95% Wilson interval, mean steps and return, and the seconds that the episodes took."""
    successes, number = sum(episode.success for episode in episodes), len(episodes)
    return {
        "success_rate": successes / number,
        "successes": successes,
        "episodes": number,
        "wilson_95": wilson_interval(successes, number),
        "mean_steps": sum(episode.steps for episode in episodes) / number,
        "mean_sum_reward": sum(episode.sum_reward for episode in episodes) / number,
        "policy_s": sum(episode.policy_s for episode in episodes),
        "environment_s": sum(episode.environment_s for episode in episodes),
    }


def finish(directory: Path, episodes: list[Episode], provenance: dict[str, Any]) -> dict[str, Any]:
    """Write contact_sheet.png and results.json, whose contents are returned. provenance: settings and versions."""
    tasks = provenance["environment"]["tasks"]
    episodes = in_order(episodes, tasks)
    results = {
        **summarize(episodes),
        "by_task": {task: summarize([episode for episode in episodes if episode.task == task]) for task in tasks},
        **provenance,
        "per_episode": [asdict(episode) for episode in episodes],
    }
    with replacing(directory / "contact_sheet.png") as path:
        contact_sheet(directory, episodes).save(path, format="png")
    write_text(directory / RESULTS_FILE, json.dumps(results, indent=2) + "\n")
    unlock(directory)
    return results


# --- tables and plots -------------------------------------------------------------------------------------------------


def table(title: str, rows: dict[str, dict[str, Any]]) -> str:
    """Summaries by name, as lines of text."""
    lines = [(title, "success", "rate", "95%", "steps", "policy ms/step", "environment ms/step")]
    for row_name, row in rows.items():
        low, high = row["wilson_95"]
        steps = row["mean_steps"] * row["episodes"]
        milliseconds = [f"{1000 * row[key] / steps:.1f}" for key in ("policy_s", "environment_s")]
        success = f"{row['successes']} of {row['episodes']}"
        rate, interval = f"{row['success_rate']:.0%}", f"{low:.0%} to {high:.0%}"
        lines.append((row_name, success, rate, interval, f"{row['mean_steps']:.0f}", *milliseconds))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def results_table(results: dict[str, Any]) -> str:
    """By task and, if there are several, pooled."""
    rows = results["by_task"]
    return table("task", rows | ({f"all {len(rows)} tasks": results} if len(rows) > 1 else {}))


def plot_sweep(option: str, rows: dict[int, dict[str, Any]], path: Path) -> None:
    """Success with 95% intervals, and the policy's time per step, against the values of an option."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    success, seconds = figure.subplots(1, 2)
    values, rates = list(rows), np.array([row["success_rate"] for row in rows.values()])
    bars = np.abs(np.array([row["wilson_95"] for row in rows.values()]) - rates[:, None]).T
    success.errorbar(values, rates, bars, fmt="o-", capsize=3)
    episodes = ", ".join(sorted({str(row["episodes"]) for row in rows.values()}))
    success.set(xlabel=option, ylabel="success rate", ylim=(-0.03, 1.03), title=f"{episodes} episodes each, 95%")
    per_step = [1000 * row["policy_s"] / (row["mean_steps"] * row["episodes"]) for row in rows.values()]
    seconds.plot(values, per_step, "o-")
    seconds.set(xlabel=option, ylabel="policy, ms per step", ylim=(0, None), title="time")
    for axes in (success, seconds):
        axes.set_xticks(values)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


# --- pictures ---------------------------------------------------------------------------------------------------------


def name(episode: Episode) -> str:
    return f"{episode.task}_{episode.seed:05d}_{episode.outcome}"


def strip_path(directory: Path, episode: Episode) -> Path:
    return directory / "strips" / f"{name(episode)}.png"


def read_strip(directory: Path, episode: Episode) -> Image.Image:
    """Raises ValueError if it is missing or damaged."""
    path = strip_path(directory, episode)
    try:
        return read_image(path)
    except ValueError as error:
        raise ValueError(
            f"{path.parent}: {error}: take the line of {episode.task}, seed {episode.seed}, out of {EPISODES_FILE}, "
            "and the episode is run again"
        ) from error


def on_sheet(episodes: list[Episode]) -> list[Episode]:
    """The episodes that the contact sheet shows: the first of each task and outcome, in turn, until it is full."""
    seen: Counter[tuple[str, bool]] = Counter()
    turns = []
    for index, episode in enumerate(episodes):
        turns.append((seen[episode.task, episode.success], index))
        seen[episode.task, episode.success] += 1
    return [episodes[index] for index in sorted(index for _, index in sorted(turns)[:SHEET_ROWS])]


def film_strip(episode: Episode, frames: list[np.ndarray], tile: int = 96) -> Image.Image:
    """A row of the contact sheet, time from left to right. Colour and text show success or failure."""
    border, label = 3, 190
    color = SUCCESS_COLOR if episode.success else FAILURE_COLOR
    strip = Image.new("RGB", (label + SHEET_COLUMNS * (tile + 2 * border), tile + 2 * border), "white")
    draw = ImageDraw.Draw(strip)
    text = f"{episode.task}\nseed {episode.seed}\n{episode.outcome}\n{episode.steps} steps"
    draw.text((6, tile // 2 - 24), text, fill=color)
    draw.rectangle((label, 0, strip.width, strip.height), fill=color)
    for column, index in enumerate(np.linspace(0, len(frames) - 1, SHEET_COLUMNS).round().astype(int)):
        image = Image.fromarray(frames[index]).resize((tile, tile))
        strip.paste(image, (label + column * (tile + 2 * border) + border, border))
    return strip


def contact_sheet(directory: Path, episodes: list[Episode]) -> Image.Image:
    """The strips of some episodes below each other, under a line that says which."""
    shown = on_sheet(episodes)
    strips = [read_strip(directory, episode) for episode in shown]
    failures = sum(not episode.success for episode in shown)
    text = f"{len(shown)} of {len(episodes)} episodes: the first failures ({failures}) and successes of each task"
    if len(shown) == len(episodes):
        text = f"all {len(episodes)} episodes: {failures} failures"
    head = 24
    sheet = Image.new("RGB", (strips[0].width, head + sum(strip.height for strip in strips)), "white")
    ImageDraw.Draw(sheet).text((6, 6), text, fill="black")
    for row, strip in enumerate(strips):
        sheet.paste(strip, (0, head + row * strip.height))
    return sheet
