"""What `data_check` says of a dataset: its problems, what is in it, and a picture."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from tqdm import tqdm

from smolvla_shared import data, data_info, data_outliers, data_pictures, data_problems, data_values
from smolvla_shared.config import DEFAULT_GAP_S, PRESETS
from smolvla_shared.data import RobotDataset
from smolvla_shared.data_outliers import IMPOSSIBLE, Vector, look_at_vector, outlier_text
from smolvla_shared.data_problems import place
from smolvla_shared.files import write_text
from smolvla_shared.mixture import DatasetEntry
from smolvla_shared.trunk_files import load_trunk_tokenizer
from smolvla_shared.video_clips import CHANGE_S, block_means, changes
from smolvla_shared.video_source import source_frames

if TYPE_CHECKING:
    from smolvla_shared.data_check import DataCheckConfig

# A pair of frames is still in which no block of 16 x 16 pixels changes by this much, of 255: --min-motion in
# docs/data.md.
STILL = 4.0
PAIRS_AT = 0.25, 0.5, 0.75  # where in an episode pairs of frames are taken
MOST_LINES = 20  # of tasks, and of problems of one kind


@dataclass
class Seen:
    """What a few decoded frames of a camera show."""

    pictures: list[np.ndarray] = field(default_factory=list)  # [h, w, 3] uint8, of some episodes
    motion: list[float] = field(default_factory=list)  # change of the most changing block, of 255, in each pair
    spread: float = 0.0  # largest deviation of a picture's pixels, of 255

    @property
    def still(self) -> float:
        """Share of the pairs without motion."""
        return float(np.mean(np.array(self.motion) < STILL)) if self.motion else float("nan")


@dataclass
class Report:
    """What is known of a dataset."""

    dataset: RobotDataset
    problems: list[str]
    notes: list[str] = field(default_factory=list)
    tasks: list[tuple[str, int]] = field(default_factory=list)  # and how many episodes begin with each
    vectors: dict[str, Vector] = field(default_factory=dict)
    cameras: dict[str, Seen] = field(default_factory=dict)


def check(config: "DataCheckConfig") -> int:
    """Print and write the reports; 1 if something is wrong."""
    reports, unread = [], {}
    for name in config.datasets:
        try:
            dataset = open_one(name)
        except ValueError as error:
            if not Path(name).is_dir():
                raise
            unread[name] = str(error)  # nothing else can be told of it
            continue
        reports.append(look(dataset, config))
    common = data_problems.twice([report.dataset for report in reports])
    texts = [*(in_words(report) for report in reports), *(verdict(name, [text]) for name, text in unread.items())]
    texts += ["\n".join([*map("problem: {}".format, common), *two_rates([report.dataset for report in reports])])]
    text = "\n\n".join(filter(None, texts))
    config.out.mkdir(parents=True, exist_ok=True)
    write_text(config.out / "report.txt", text + "\n")
    for report in reports:
        name = "--".join(Path(report.dataset.name).resolve().parts[-2:])
        data_pictures.draw(config.out / f"{name}.png", report)
    print(text, f"report and pictures: {config.out}", sep="\n\n")
    return int(bool(unread or common or any(report.problems for report in reports)))


def open_one(name: str) -> RobotDataset:
    """Raises ValueError for what is no dataset, and for one whose tables cannot be read."""
    entry = DatasetEntry(root=name) if Path(name).is_dir() else DatasetEntry(repo_id=name)
    return RobotDataset(entry, data.place(entry), DEFAULT_GAP_S)


def two_rates(datasets: list[RobotDataset]) -> list[str]:
    rates = {dataset.name: dataset.fps for dataset in datasets}
    listing = ", ".join(f"{name} {fps:g}" for name, fps in rates.items())
    return [f"note: datasets of different rates, frames a second: {listing}"] if len(set(rates.values())) > 1 else []


# --- looking ----------------------------------------------------------------------------------------------------------


def look(dataset: RobotDataset, config: "DataCheckConfig") -> Report:
    report = Report(dataset, data_problems.table_problems(dataset))
    report.problems += [*data_problems.header_problems(dataset), *data_problems.image_problems(dataset)]
    keys = [key for key in (data.STATE_KEY, data.ACTION_KEY, data.EXECUTED_ACTION_KEY) if key in dataset.features]
    for key in keys:
        report.problems += data_values.vector_problems(dataset, key)
    report.problems += data_values.missing_statistics(dataset, keys)
    report.problems = [*dict.fromkeys(report.problems)]
    report.notes += [] if report.problems else data_values.sampled_statistics(dataset, keys)
    if any(data_problems.episode_problems(dataset)):
        return report  # which rows are an episode's is not known
    for key in keys:
        if key in dataset.vectors and dataset.features[key]["shape"] == (dataset.vector(key)[:1].size,):
            report.vectors[key] = vector = look_at_vector(dataset, key)
            for outlier in vector.outliers:
                said = report.problems if outlier.ranges > IMPOSSIBLE else report.notes
                said.append(outlier_text(dataset, key, vector, outlier))
    if data.ACTION_KEY in report.vectors:
        report.problems += data_outliers.still_actions(dataset)
    if not any(data_problems.task_problems(dataset)):
        report.tasks = task_counts(dataset)
        report.notes += data_values.without_text([dataset])
        report.problems += cut_texts(dataset, config)
    look_at_cameras(report, config)
    return report


def cut_texts(dataset: RobotDataset, config: "DataCheckConfig") -> list[str]:
    if not any(len(text.encode()) >= config.max_text_tokens for text in dataset.tasks):
        return []
    tokenizer = load_trunk_tokenizer(PRESETS.get(config.tokenizer, config.tokenizer), None)
    return data_values.texts_cut([dataset], tokenizer, config.max_text_tokens)


def look_at_cameras(report: Report, config: "DataCheckConfig") -> None:
    """Decode the frames of some episodes, and what is asked for of the videos."""
    dataset, count = report.dataset, len(report.dataset.episode_from)
    episodes = np.unique(np.linspace(0, count - 1, min(config.episodes, count)).round().astype(int)).tolist()
    for camera in dataset.camera_keys:
        feature = dataset.features[camera]
        if problem := data_info.camera_problem(camera, feature):
            (report.notes if data_info.is_depth(feature) else report.problems).append(problem)
            continue
        report.cameras[camera] = seen = Seen()
        broken = [*look_at_episodes(dataset, camera, episodes, seen)]
        report.problems += broken[:MOST_LINES]
        if seen.pictures and seen.spread < 2:
            report.problems.append(f"every frame of {camera} that was decoded is of one colour: was it covered or off?")
        if config.every_frame:
            decode = decode_all if camera in dataset.video_keys else open_all
            report.problems += [*decode(dataset, camera)][:MOST_LINES]


def look_at_episodes(dataset: RobotDataset, camera: str, episodes: list[int], seen: Seen) -> Iterator[str]:
    """The first and the last frame of each episode, and pairs in between."""
    gap = max(1, round(CHANGE_S * dataset.fps))
    for episode in tqdm(episodes, desc=f"{dataset.name} {camera}", unit="episode", disable=len(episodes) < 20):
        start, end = int(dataset.episode_from[episode]), int(dataset.episode_to[episode])
        firsts = [start + int(share * (end - start - gap)) for share in PAIRS_AT] if end - start > gap else []
        rows = [start, end - 1, *firsts, *(row + gap for row in firsts)]
        try:
            frames = dataset.read_frames(camera, rows).permute(0, 2, 3, 1).numpy()
        # torchcodec raises RuntimeErrors and IndexErrors, Pillow and FFmpeg OSErrors.
        except (ValueError, RuntimeError, IndexError, OSError, av.FFmpegError) as error:
            yield f"episode {episode}: frames of {camera} cannot be read: {str(error).splitlines()[0]}"
            continue
        if (found := frames.shape[1:3]) != (expected := dataset.frame_shape(camera)[1:]):
            yield f"episode {episode}: frames of {camera} have {found} pixels, meta/info.json says {expected}"
        seen.pictures.append(frames[2 if firsts else 0])
        seen.spread = max(seen.spread, float(frames.std()))
        for first, second in zip(frames[2 : 2 + len(firsts)], frames[2 + len(firsts) :]):
            seen.motion += changes(np.stack([block_means(first), block_means(second)]), 1).tolist()


def open_all(dataset: RobotDataset, camera: str) -> Iterator[str]:
    try:
        _ = dataset.images
    except ValueError as error:  # of all rows: it would be tried again for each
        yield str(error)
        return
    for row in tqdm(range(dataset.num_frames), desc=f"every image of {camera}", unit="image"):
        try:
            found = tuple(dataset.read_frames(camera, [row]).shape[2:])
        except ValueError as error:
            yield str(error)
            continue
        if found != (expected := dataset.frame_shape(camera)[1:]):
            yield f"{place(dataset, row)}: its image of {camera} has {found} pixels, meta/info.json says {expected}"


def decode_all(dataset: RobotDataset, camera: str) -> Iterator[str]:
    files = np.stack([dataset.episodes[f"videos/{camera}/{name}_index"] for name in ("chunk", "file")], axis=1)
    for chunk, file in tqdm(np.unique(files, axis=0).tolist(), desc=f"every frame of {camera}", unit="file"):
        path = dataset.info.video_path.format(video_key=camera, chunk_index=chunk, file_index=file)
        try:
            for _ in source_frames(dataset.root / path, round(dataset.fps)):
                pass
        except (av.FFmpegError, OSError, ValueError) as error:
            yield f"{path} is damaged ({error}): copy or download the dataset again"


# --- saying -----------------------------------------------------------------------------------------------------------


def in_words(report: Report) -> str:
    dataset = report.dataset
    lines = [
        f"{dataset.name}: {dataset.num_frames:,} frames, {len(dataset.episode_from):,} episodes, "
        f"{dataset.num_frames / dataset.fps / 3600:.2f} h at {dataset.fps:g} fps"
    ]
    seconds = (dataset.episode_to - dataset.episode_from) / dataset.fps
    short, long = int(seconds.argmin()), int(seconds.argmax())
    lines.append(
        f"  episodes: {seconds[short]:.2f} s (episode {short}) to {seconds[long]:.2f} s (episode {long}), median "
        f"{np.median(seconds):.2f} s"
    )
    for camera, seen in report.cameras.items():
        _, height, width = dataset.frame_shape(camera)
        motion = f"{seen.still:.0%} of {len(seen.motion)} pairs, {CHANGE_S} s apart, are still" if seen.motion else ""
        lines.append(f"  {camera}: {height} x {width} pixels (height x width), {motion or 'no pairs'}")
    if report.tasks:
        lines.append(f"  {len(report.tasks)} task(s), with the number of episodes:")
        lines += [f"    {count:>6,}  {text!r:.100}" for text, count in report.tasks[:MOST_LINES]]
    head = "".join(f"{title:>11}" for title in ("least", "1%", "mean", "deviation", "99%", "most"))
    for key, vector in report.vectors.items():
        lines.append(f"  {key:22}{head}")
        columns = vector.all.low, vector.usual_low, vector.all.mean, vector.all.std, vector.usual_high, vector.all.high
        for name, *numbers in zip(vector.names, *columns, strict=True):
            lines.append(f"    {name[-20:]:20}" + "".join(f"{number:>11.4g}" for number in numbers))
    lines += [f"  note: {note}" for note in report.notes]
    return "\n".join([*lines, verdict(dataset.name, report.problems)])


def verdict(name: str, problems: list[str]) -> str:
    if not problems:
        return f"{name}: nothing wrong was found"
    return "\n".join([f"{name}: {len(problems)} problem(s)", *(f"  problem: {problem}" for problem in problems)])


def task_counts(dataset: RobotDataset) -> list[tuple[str, int]]:
    """Every task and how many episodes begin with it, the most frequent first."""
    counts = np.bincount(dataset.frames["task_index"][dataset.episode_from], minlength=len(dataset.tasks))
    order = np.argsort(-counts, kind="stable").tolist()
    return [(dataset.tasks[task], int(counts[task])) for task in order]
