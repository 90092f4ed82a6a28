"""The command that makes a LeRobotDataset (v3) without actions of video clips and folders of images.

    python -m smolvla_shared.video clips/ --root data/my_video

Converted clips are kept in `<root>.unfinished`, a video and a JSON each, until the dataset is made of them: after a
kill the same command goes on there. Worker processes import this module, so torch and LeRobot are imported late.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from string import Formatter
from typing import Any, Literal

import av
import tyro
from tqdm import tqdm

from smolvla_shared import paths, ranges
from smolvla_shared.command import parse, run_command
from smolvla_shared.locks import lock, unlock
from smolvla_shared.refusals import decode, read_json, refuse_differences
from smolvla_shared.video_captions import Caption, read_captions, text_of
from smolvla_shared.video_clips import ClipOptions, Part, attempt, convert, start_worker
from smolvla_shared.video_source import IMAGES, VIDEOS, Look, fitted, look, stamp

# Columns of every dataset, and what policies read beside cameras.
NO_CAMERA = {"timestamp", "frame_index", "episode_index", "index", "task_index", "task", "action", "observation.state"}
SKIPPED = 3  # the exit code if there is a dataset, but without some clips


@dataclass(frozen=True)
class VideoConfig:
    """Make a LeRobotDataset without actions of video clips. If the command is killed, run it again: it goes on where it
    stopped."""

    # Clips that FFmpeg reads, and folders, which are searched for clips. A folder that holds images and no clips is a
    # clip itself: its images, in the order of the numbers in their names.
    clips: tyro.conf.Positional[tuple[Path, ...]]
    # Directory of the new dataset.
    root: paths.Directory
    # The dataset's name for the camera.
    camera: str = "observation.image"
    # Frames a second of the dataset.
    fps: ranges.Few = 10
    # Longer side of every clip in the dataset, pixels. Clips of another shape than most get black margins.
    size: int = 256
    # Images a second of folders of images. They do not tell it themselves, so it must be stated for them.
    image_fps: ranges.Few | None = None
    # Where a clip is cut into episodes: nowhere, where it is too long, or at scene changes, too.
    cut: Literal["none", "length", "scenes"] = "scenes"
    # FFmpeg's scene score that is a scene change, of 100.
    scene_threshold: ranges.Percent = 10.0
    # Longer episodes are cut into equal parts.
    max_episode_s: ranges.Positive = 30.0
    # Shorter episodes are left out.
    min_episode_s: ranges.NotNegative = 1.0
    # Stretches are left out in which no block of 16 x 16 pixels changes by this much (of 255) within 0.5 s; 0: none
    # are. The command tells how much the clips move.
    min_motion: ranges.Brightness = 0.0
    # Task text: {folder} and {stem} are a clip's names, with spaces for underscores, and {caption} is its text in
    # --captions. Default: "{caption}" if there are captions, else "{folder}".
    task: str | None = None
    # Captions of the clips: a JSON list of objects or a CSV file with a header, with `id` (a clip's name, with or
    # without its ending) and `label`. With `start_s` too (and perhaps `end_s`), seconds, or in Ego4D's narration.json,
    # they are of moments, and each episode gets the one that fits it. What has no caption is left out.
    captions: Path | None = None
    # Quality of H.264: lower is better and larger.
    crf: int = 20
    # A clip that already fits (H.264, size, rate) is copied, unless more frames than this lie between its key frames:
    # for a random frame, all frames since the last key frame are decoded. 0: all clips are encoded again.
    max_gop: ranges.CountOrNone = 30
    # Processes that convert, a clip each.
    num_workers: ranges.Processes = field(default_factory=lambda: os.cpu_count() or 1)

    def __post_init__(self) -> None:
        ranges.check(self, "--")
        if not 32 <= self.size <= 8192 or self.size % 2:
            raise ValueError(f"--size {self.size}: the longer side must be even, at least 32 and at most 8,192 pixels")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"--crf {self.crf}: H.264's quality is 0 (best) to 51; 20 is usual")
        if self.max_episode_s < self.min_episode_s:
            raise ValueError(f"--max-episode-s {self.max_episode_s} is less than --min-episode-s {self.min_episode_s}")
        check_camera(self.camera)
        check_pattern(self)


def check_camera(name: str) -> None:
    """Raise ValueError for a name that LeRobot gives to no camera, or that is a column of every dataset."""
    if "/" in name or name.startswith(".") or name in NO_CAMERA:
        raise ValueError(
            f"--camera {name} cannot be a camera: it is a directory of the dataset and must be no other column's name; "
            "pass observation.image, or observation.images.<name>"
        )


def check_pattern(config: VideoConfig) -> None:
    """Raise ValueError for a --task that is no text with names of a clip in braces."""
    known = ["folder", "stem"] + ["caption"] * bool(config.captions)
    try:
        parts = [part for part in Formatter().parse(config.task or "") if part[1] is not None]
    except ValueError as error:
        raise ValueError(
            f"--task {config.task!r}: {error}; names stand in braces, {{{{ and }}}} are braces themselves"
        ) from error
    if unknown := [name for _, name, *_ in parts if name not in known]:
        raise ValueError(f"--task {config.task!r}: {unknown} unknown, there are {known}; {{caption}} needs --captions")
    for _, name, form, conversion in parts:
        if form or conversion:
            raise ValueError(f"--task {config.task!r}: {name} is a text and takes no format: write {{{name}}}")


# --- which clips ------------------------------------------------------------------------------------------------------


def find_clips(named: tuple[Path, ...]) -> list[Path]:
    """Every clip once, sorted. Raises ValueError for a path that does not exist, and if there are no clips."""
    found, other = set(), set()
    for path in named:
        if path.is_dir():
            for folder, _, names in os.walk(path, followlinks=True):
                files = [Path(folder, name) for name in names if not name.startswith(".")]
                clips = [file for file in files if file.suffix.lower() in VIDEOS]
                images = [file for file in files if file.suffix.lower() in IMAGES]
                found |= set(clips) if clips or not images else {Path(folder)}
                other |= set(files) - set(clips) - set(() if clips else images)
        elif path.is_file():
            found.add(path)
        elif path.exists():
            raise ValueError(f"{path} is neither a file nor a folder: name clips, or folders of clips or images")
        else:
            raise ValueError(f"there is no {path}: name clips, or folders of clips or images")
    if other:
        print(f"{len(other)} files are no clips, such as {min(other)}: name a file itself if FFmpeg should try it")
    if not found:
        raise ValueError(
            f"no clips in {', '.join(map(str, named))}: their names should end in {' '.join(sorted(VIDEOS))}"
        )
    return sorted({path.resolve(): path for path in sorted(found)}.values())


def task_texts(clips: list[Path], config: VideoConfig) -> dict[Path, list[Caption]]:
    """The tasks of each clip that has any, as captions. Raises ValueError if no clip has a caption."""
    captions = read_captions(config.captions) if config.captions else {}
    pattern = ("{caption}" if config.captions else "{folder}") if config.task is None else config.task
    texts = {}
    for clip in clips:
        stem = clip.name if clip.is_dir() else clip.stem
        values = {"folder": clip.resolve().parent.name.replace("_", " "), "stem": stem.replace("_", " ")}
        found = captions.get(clip.name, captions.get(stem)) if config.captions else [Caption("")]
        if found:
            texts[clip] = [replace(one, text=pattern.format(**values, caption=one.text)) for one in found]
    if not texts:
        raise ValueError(
            f"--captions {config.captions}: no clip has a caption; the first clip is {clips[0].name}, the first "
            f"caption is of {next(iter(captions), 'nothing')}"
        )
    if len(texts) < len(clips):
        missing = [clip for clip in clips if clip not in texts]
        print(f"{len(missing)} of {len(clips)} clips have no caption and are left out, such as {missing[0]}")
    return texts


# --- converting -------------------------------------------------------------------------------------------------------


def in_workers(
    function: Callable, jobs: dict[Path, tuple], config: VideoConfig, bar: tqdm, seconds: bool
) -> Iterator[tuple[Path, Any]]:
    """(clip, result of function(clip, *job)) as they come: a text is why a clip is broken.

    seconds: the bar counts seconds of video, which the workers tell, not clips
    """
    context, todo, running = multiprocessing.get_context("spawn"), iter(jobs.items()), {}
    progress, before = context.Value("d", 0.0), bar.n
    try:
        with ProcessPoolExecutor(config.num_workers, context, start_worker, (progress,)) as pool:
            while True:
                while len(running) < 2 * config.num_workers and (job := next(todo, None)):
                    running[pool.submit(attempt, function, job[0], *job[1])] = job[0]
                if not running:
                    return
                done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    result = future.result()
                    yield running.pop(future), result
                bar.update(min(before + progress.value, bar.total) - bar.n if seconds else len(done))
    except BrokenProcessPool as error:
        raise ValueError(
            f"a worker process was killed, perhaps for want of memory, with {', '.join(map(str, running.values()))}: "
            "pass a smaller --num-workers, or leave the clip out; the same command goes on where this one stopped"
        ) from error


def look_at(clips: list[Path], config: VideoConfig) -> tuple[dict[Path, Look], dict[Path, str]]:
    """Sizes and lengths of the clips, and why some are broken."""
    looks, broken = {}, {}
    with tqdm(total=len(clips), desc="look", unit="clip") as bar:
        jobs = {clip: (config.image_fps or config.fps,) for clip in clips}
        for clip, result in in_workers(look, jobs, config, bar, seconds=False):
            (broken if isinstance(result, str) else looks)[clip] = result
    return looks, broken


def clip_options(config: VideoConfig, looks: dict[Path, Look]) -> ClipOptions:
    """The frame is the smallest that holds every clip."""
    sizes = [fitted(seen.width, seen.height, config.size) for seen in looks.values()]
    frame = max(height for _, height in sizes), max(width for width, _ in sizes)
    if margins := sum((height, width) != frame for width, height in sizes):
        print(f"{margins} of {len(sizes)} clips get black margins: the frame is {frame[1]} x {frame[0]} pixels for all")
    own = {option.name for option in fields(ClipOptions)} - {"frame", "image_fps"}
    return ClipOptions(frame=frame, image_fps=config.image_fps or config.fps, **{n: getattr(config, n) for n in own})


def claim(work: Path, options: ClipOptions) -> None:
    """Keep the directory to this process. Raises ValueError if another one writes there, and if it holds clips that
    were converted with other options.
    """
    from smolvla_shared.files import write_text

    manifest, about = work / "conversion.json", (f"{work}, of this --root,", "wait for it or stop it")
    asked = json.loads(json.dumps(asdict(options) | {"pyav": av.__version__}))
    if manifest.exists():
        lock(work, *about)
        try:
            found = read_json(manifest)
            refuse_differences(
                f"{work} holds clips of an unfinished command with other options. Use those, or remove the directory",
                [(name, asked.get(name), found.get(name)) for name in sorted(asked | found)],
                asked="asked for",
            )
        except ValueError:
            unlock(work)
            raise
    elif work.exists():
        raise ValueError(f"{work} exists and holds something else: remove it, or name another --root")
    else:
        (work / "parts").mkdir(parents=True, exist_ok=True)
        lock(work, *about)
        write_text(manifest, json.dumps(asked, indent=2))


def work_of(config: VideoConfig) -> Path:
    return config.root.absolute().with_name(f"{config.root.name}.unfinished")


def video_of(work: Path, clip: Path) -> Path:
    return work / "parts" / f"{hashlib.sha256(str(clip.resolve()).encode()).hexdigest()[:16]}.mp4"


def finished(work: Path, clip: Path) -> Part | None:
    """A clip that an earlier command converted, if the clip is still the same."""
    path = video_of(work, clip).with_suffix(".json")
    part = decode(Part, read_json(path), str(path)) if path.exists() else None
    return part if part and part.source == stamp(clip) else None


def convert_all(
    looks: dict[Path, Look], options: ClipOptions, config: VideoConfig
) -> tuple[dict[Path, Part], dict[Path, str]]:
    """The converted clips, and why some are broken."""
    from smolvla_shared.files import sync, write_text

    work = work_of(config)
    parts = {clip: part for clip in looks if (part := finished(work, clip))}
    broken = {}
    if parts:
        print(f"{len(parts)} of {len(looks)} clips were converted before")
    jobs = {clip: (options, video_of(work, clip)) for clip in looks if clip not in parts}
    seconds = {clip: round(seen.seconds) for clip, seen in looks.items()}
    form = "{l_bar}{bar}| {n:.0f} of {total:.0f} s of video [{elapsed}<{remaining}{postfix}]"
    with tqdm(total=sum(seconds.values()), desc="convert", bar_format=form) as bar:
        bar.update(sum(seconds[clip] for clip in parts))
        bar.initial = bar.n
        for clip, result in in_workers(convert, jobs, config, bar, seconds=True):
            if isinstance(result, str):
                broken[clip] = result
            else:
                sync(video_of(work, clip))
                write_text(video_of(work, clip).with_suffix(".json"), json.dumps(asdict(result)))
                parts[clip] = result
            bar.set_postfix_str(f"{len(parts)} of {len(looks)} clips" + (f", {len(broken)} broken" if broken else ""))
    return parts, broken


def with_tasks(part: Part, captions: list[Caption], fps: int) -> tuple[tuple[str, ...], Part]:
    """The texts of the episodes that have one, and the clip with these episodes alone."""
    texts = {(start, end): text_of(captions, start / fps, end / fps) for start, end in part.episodes}
    told = {episode: text for episode, text in texts.items() if text is not None}
    return tuple(told.values()), replace(part, episodes=tuple(told))


def assemble(
    parts: dict[Path, Part],
    broken: dict[Path, str],
    captions: dict[Path, list[Caption]],
    options: ClipOptions,
    config: VideoConfig,
) -> None:
    """The dataset of the converted clips at --root. Raises ValueError if they have no episode."""
    from smolvla_shared import video_dataset

    work = work_of(config)
    told = {clip: with_tasks(parts[clip], captions[clip], options.fps) for clip in captions if clip in parts}
    clips = [video_dataset.Converted(clip, *told[clip], video_of(work, clip)) for clip in told if told[clip][0]]
    without_episode = [clip for clip in told if not told[clip][0]]
    if not clips:
        reason = "no episode, see --min-episode-s and --min-motion"
        reasons = broken | {c: "no caption in time" if parts[c].episodes else reason for c in without_episode}
        listing = "\n  ".join(f"{clip}: {reason}" for clip, reason in reasons.items())
        raise ValueError(f"no clip gives an episode:\n  {listing}")
    unfinished = work / "dataset"
    shutil.rmtree(unfinished, ignore_errors=True)
    meta = video_dataset.write_dataset(unfinished, config.root.name, config.camera, clips, options)
    video_dataset.write_report(unfinished, clips, without_episode, broken)
    unfinished.rename(config.root)
    unlock(work)
    shutil.rmtree(work)
    motion = sorted(clip.part.motion[1] for clip in clips)
    print(
        f"{config.root}: {len(clips)} clips, {sum(clip.part.copied for clip in clips)} of them copied; "
        f"{meta.total_episodes} episodes, {meta.total_frames:,} frames of {options.frame[1]} x {options.frame[0]} "
        f"pixels at {meta.fps} fps, {meta.total_frames / meta.fps / 3600:.2f} h; {meta.total_tasks} task(s)\n"
        f"motion in the median frame of a clip (see --min-motion): {motion[0]:.1f} to {motion[-1]:.1f}, half of the "
        f"clips below {motion[len(motion) // 2]:.1f}"
    )
    all_episodes = sum(len(parts[clip].episodes) for clip in told)
    if all_episodes > meta.total_episodes:
        print(f"{all_episodes - meta.total_episodes} of {all_episodes} episodes have no caption and are left out")
    if without_episode:
        what = "too short, too still or without a caption in time"
        print(f"{len(without_episode)} clips gave no episode, {what}, such as {without_episode[0]}")


def main(arguments: list[str] | None = None) -> int:
    config = parse(VideoConfig, prog="python -m smolvla_shared.video", args=arguments)
    if config.root.exists():
        raise ValueError(f"--root {config.root} exists: remove it, or name another directory")
    for folder in config.clips:
        if folder.is_dir() and config.root.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"--root {config.root} is in {folder}, which is searched for clips: name another directory"
            )
    clips = find_clips(config.clips)
    if config.image_fps is None and (folder := next((clip for clip in clips if clip.is_dir()), None)):
        raise ValueError(f"{folder} is a folder of images: pass --image-fps, the images a second they were taken at")
    tasks = task_texts(clips, config)
    looks, broken = look_at(list(tasks), config)
    if not looks:
        clip, reason = next(iter(broken.items()))
        raise ValueError(f"none of {len(broken)} clips can be read, such as {clip}: {reason}")
    options = clip_options(config, looks)
    claim(work_of(config), options)
    parts, more = convert_all(looks, options, config)
    broken |= more
    assemble(parts, broken, tasks, options, config)
    if broken:
        listing = "\n  ".join(f"{clip}: {reason}" for clip, reason in sorted(broken.items()))
        print(f"{len(broken)} of {len(tasks)} clips are broken and not in the dataset:\n  {listing}")
    return SKIPPED if broken else 0


if __name__ == "__main__":
    run_command(lambda: sys.exit(main()))
