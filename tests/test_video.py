"""python -m smolvla_shared.video: every frame is the one shown at its time, whatever a clip was; what is cut, copied,
skipped and refused; a killed command goes on."""

import csv
import json
import os
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from forked import Forked, run_forked
from helpers import bars, names_in, read_bars
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from PIL import Image
from tqdm import tqdm

from smolvla_shared import data, video, video_dataset
from smolvla_shared.config import DataConfig
from smolvla_shared.video_clips import ClipOptions, attempt, convert, cut_episodes
from smolvla_shared.video_source import stamp

CAMERA = "observation.image"


def write_clip(
    path: Path,
    times: list[Fraction],
    draw: Callable[[int], np.ndarray],
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rate: Fraction | int = 30,
    container: dict | None = None,
    **options: str,
) -> Path:
    """A clip of the pictures draw(0), draw(1), ... at these times."""
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = draw(0).shape[:2]
        stream.pix_fmt = pix_fmt
        # Fine enough for any time, but AVI and MPEG-4 count frames.
        step = 1 / Fraction(rate) if codec in ("mpeg4", "mjpeg") else Fraction(1, 90000)
        stream.codec_context.time_base = step
        for index, at in enumerate(times):
            frame = av.VideoFrame.from_ndarray(draw(index), "rgb24")
            frame.pts, frame.time_base = round(at / step), step
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def regular(count: int, rate: Fraction | int) -> list[Fraction]:
    return [index / Fraction(rate) for index in range(count)]


def turn(path: Path) -> None:
    """What a phone that is held upright writes: the stored pictures are to be turned clockwise by 90 degrees."""
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


def run(*arguments: str | Path | float) -> int:
    return video.main([str(argument) for argument in arguments])


def pictures(root: Path) -> list[np.ndarray]:
    """Every frame as LeRobot reads it, [h, w, 3] uint8."""
    dataset = LeRobotDataset(root.name, root=root)
    return [
        (dataset[row][CAMERA].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8) for row in range(len(dataset))
    ]


def report(root: Path) -> dict[str, dict]:
    lines = map(json.loads, (root / "clips.jsonl").read_text().splitlines())
    return {Path(line["clip"]).name: line for line in lines}


# --- frames and their times -------------------------------------------------------------------------------------------

MS = Fraction(1, 1000)
NTSC = Fraction(30000, 1001)
IRREGULAR = np.random.default_rng(0).integers(5, 90, 40).cumsum()  # ms
VARIABLE = [Fraction(int(at) - int(IRREGULAR[0]), 1000) for at in IRREGULAR]
CLIPS = {  # name: times, size, how it is written
    "a.mp4": (regular(45, 30), (128, 64), {}),
    "b.webm": (regular(45, NTSC), (256, 128), {"codec": "libvpx-vp9", "rate": NTSC, "deadline": "realtime"}),
    "c.avi": (regular(40, 25), (64, 32), {"codec": "mpeg4", "rate": 25, "bf": "2", "qscale": "3"}),
    "d.mov": (VARIABLE, (128, 64), {"bf": "2"}),
    "e.mkv": (VARIABLE, (127, 63), {"pix_fmt": "yuv444p"}),
    "f.mp4": (regular(20, 12), (128, 64), {"rate": 12}),
    "g.mp4": (regular(90, 60), (64, 128), {"rate": 60}),  # turned upright
    "h.ts": (regular(30, 24), (160, 80), {"rate": 24, "codec": "libx265", "x265-params": "log-level=none"}),
}
FPS, SIZE = 12, 128


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Clips of all kinds, and a folder of images, whose pictures tell their number."""
    folder = tmp_path_factory.mktemp("clips") / "push_the_cup"
    folder.mkdir()
    for name, (times, size, options) in CLIPS.items():
        turned = name == "g.mp4"
        write_clip(
            folder / name, times, lambda i, s=size, t=turned: np.ascontiguousarray(np.rot90(bars(i, *s), t)), **options
        )
        if turned:
            turn(folder / name)
    (folder / "images").mkdir()
    for index in range(24):
        Image.fromarray(bars(index, 100, 50)).save(folder / "images" / f"frame_{index}.png")
    (folder / "notes.txt").write_text("not a clip")
    return folder


@pytest.fixture(scope="module")
def converted(clips) -> Path:
    root = clips.parent / "dataset"
    options = ["--fps", FPS, "--size", SIZE, "--cut", "none", "--image-fps", 8, "--num-workers", 2]
    assert run(clips, "--root", root, *options) == 0
    return root


def test_every_frame_is_the_last_one_shown_at_its_time(converted):
    """To a millisecond, which containers round to. The frame is 128 x 128, because one clip is upright."""
    found, told = pictures(converted), report(converted)
    sources = {name: (times, size) for name, (times, size, _) in CLIPS.items()} | {
        "images": (regular(24, 8), (100, 50))
    }
    assert told.keys() == sources.keys()
    for name, (times, size) in sources.items():
        (episode, (start, end)) = next(iter(told[name]["episodes"].items()))
        assert start == 0
        first = sum(span[1] for line in told.values() for e, span in line["episodes"].items() if int(e) < int(episode))
        height, width = (128, 64) if size[1] > size[0] else (64, 128)
        top, left = (128 - height) // 2, (128 - width) // 2
        for frame in range(end):
            picture = found[first + frame]
            number = read_bars(picture[top : top + height, left : left + width])
            assert number == max(i for i, at in enumerate(times) if at <= Fraction(frame, FPS) + MS), (name, frame)
            assert not picture[: top - 1].any() or top == 0
        last = times[-1] + np.diff(times)[-1] * (times is not VARIABLE)
        assert last - Fraction(1, FPS) - 0.05 <= Fraction(end - 1, FPS) < last + Fraction(1, 10), name


def test_the_dataset_is_one_without_actions(converted):
    (dataset,) = data.open_datasets(DataConfig(roots=(converted,)))
    assert dataset.features[CAMERA]["shape"] == (128, 128, 3)
    assert not {"action", "observation.state"} & dataset.features.keys()
    assert dataset.fps == FPS
    assert len(dataset.episode_from) == len(CLIPS) + 1
    assert {dataset.task(row) for row in dataset.episode_from} == {"push the cup"}
    rows = [int(dataset.episode_to[4]) - 1, 0, int(dataset.episode_from[7])]
    for frame, expected in zip(dataset.read_frames(CAMERA, rows), [pictures(converted)[row] for row in rows]):
        assert np.abs(frame.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1
    stats = LeRobotDatasetMetadata(converted.name, root=converted).stats[CAMERA]
    assert stats["mean"].shape == (3, 1, 1)
    every = np.concatenate([picture.reshape(-1, 3) for picture in pictures(converted)]) / 255
    assert np.abs(stats["mean"].ravel() - every.mean(axis=0)).max() < 0.05
    assert names_in(converted) == ["clips.jsonl", "data", "meta", "videos"]
    assert not converted.with_name("dataset.unfinished").exists()


@pytest.mark.parametrize(("colorspace", "color_range"), [(1, 1), (1, 2), (5, 1), (5, 2)])
def test_colours_survive(tmp_path, colorspace, color_range):
    """BT.709 and BT.601, limited and full range; FFmpeg's own filter makes the clip."""
    clip, color = tmp_path / "clip.mkv", np.array([210, 40, 90])
    with av.open(str(clip), "w") as file:
        stream = file.add_stream("libx264", rate=10, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = colorspace, color_range
        graph = av.filter.Graph()
        matrix = {1: "bt709", 5: "bt601"}[colorspace]
        ends = graph.add_buffer(width=64, height=32, format="rgb24", time_base=Fraction(1, 10)), graph.add("buffersink")
        scale = graph.add("scale", f"out_color_matrix={matrix}:out_range={'tv' if color_range == 1 else 'pc'}")
        graph.link_nodes(ends[0], scale, graph.add("format", "yuv420p"), ends[1]).configure()
        for index in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((32, 64, 3), color, np.uint8), "rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 10)
            graph.push(frame)
            file.mux(stream.encode(graph.pull()))
        file.mux(stream.encode())
    convert(clip, clip_options((16, 32), crf=5), tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as file:
        found = next(file.decode(video=0)).to_ndarray(format="rgb24")[8, 16]
    assert np.abs(found.astype(int) - color).max() <= 4


# --- folders of images ------------------------------------------------------------------------------------------------


def test_a_folder_of_images_is_a_clip(tmp_path):
    """Every image, in the order of the numbers; PNG with alpha and turned JPEG; each as often as its time says."""
    for name, ending, count in ("one", "JPG", 25), ("two", "png", 12):
        (tmp_path / "frames" / name).mkdir(parents=True)
        for index in range(count):
            image, exif = Image.fromarray(bars(index, 96, 48)), Image.Exif()
            if name == "one":
                image, exif[0x0112] = image.transpose(Image.Transpose.ROTATE_90), 6  # to be turned clockwise
            elif index % 2:
                image.putalpha(255)
            image.save(tmp_path / "frames" / name / f"take 2 - {index}.{ending}", exif=exif)
    options = ["--image-fps", 5, "--fps", 10, "--size", 96, "--cut", "none", "--task", "{stem}"]
    assert run(tmp_path / "frames", "--root", tmp_path / "out", *options) == 0
    dataset = LeRobotDataset("out", root=tmp_path / "out")
    assert [read_bars(picture) for picture in pictures(tmp_path / "out")] == [i // 2 for i in [*range(50), *range(24)]]
    assert [dataset[row]["task"] for row in (0, 49, 50, 73)] == ["one", "one", "two", "two"]


def test_images_have_no_rate_of_their_own(tmp_path):
    (tmp_path / "frames").mkdir()
    Image.fromarray(bars(0, 96, 48)).save(tmp_path / "frames" / "0.png")
    with pytest.raises(ValueError, match=r"frames is a folder of images: pass --image-fps"):
        run(tmp_path / "frames", "--root", tmp_path / "out")
    assert names_in(tmp_path) == ["frames"]


def test_folders_with_other_sizes_or_unreadable_images_are_skipped_and_listed(tmp_path, capsys):
    rng = np.random.default_rng(0)

    def save(folder: str, index: int, ending: str = "png") -> Path:
        (tmp_path / "frames" / folder).mkdir(parents=True, exist_ok=True)
        path = tmp_path / "frames" / folder / f"{index}.{ending}"
        Image.fromarray(rng.integers(0, 256, (48, 96, 3), np.uint8)).save(path)
        return path

    for index in range(20):
        for folder, ending in {"whole": "png", "sizes": "png", "cut": "jpg", "damaged": "png", "depth": "png"}.items():
            save(folder, index, ending)
    frames = tmp_path / "frames"
    Image.new("RGB", (96, 50)).save(frames / "sizes" / "10.png")
    for name in ("cut/3.jpg", "damaged/0.png"):
        content = (frames / name).read_bytes()
        half = len(content) // 2
        (frames / name).write_bytes(content[:half] + (b"" if name == "cut/3.jpg" else bytes(8) + content[half + 8 :]))
    Image.fromarray(np.full((48, 96), 1000, np.uint16)).save(frames / "depth" / "19.png")
    assert run(frames, "--root", tmp_path / "out", "--image-fps", 10) == video.SKIPPED
    broken = {name: line["broken"] for name, line in report(tmp_path / "out").items() if "broken" in line}
    assert broken.keys() == {"sizes", "cut", "damaged", "depth"}
    assert broken["sizes"].startswith("0.png is 96 x 48 pixels, 10.png 96 x 50: ")
    assert broken["cut"].startswith("3.jpg: image file is truncated")
    assert broken["damaged"].startswith("0.png: ")
    assert broken["depth"] == "19.png: it has more than 8 bits a channel, as pictures of depth have"
    printed = capsys.readouterr().out
    assert "4 of 5 clips are broken" in printed and all(reason in printed for reason in broken.values())


def test_a_folder_whose_image_changed_is_another_clip(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(b"an image")
    before = stamp(tmp_path)
    (tmp_path / "notes.txt").touch()
    assert stamp(tmp_path) == before
    (tmp_path / "1.png").write_bytes(b"another image")
    assert stamp(tmp_path) != before


# --- episodes ---------------------------------------------------------------------------------------------------------


def clip_options(frame: tuple[int, int] = (64, 128), **options) -> ClipOptions:
    config = video.VideoConfig(clips=(), root=Path(), **{"fps": 10, "size": max(frame)} | options)
    looks = {Path(): video.Look(frame[1], frame[0], 0.0)}
    return video.clip_options(config, looks)


def scene(index: int, speed: int, seed: int) -> np.ndarray:
    """A texture that moves by `speed` pixels a frame; the seed is the scene."""
    rng = np.random.default_rng(seed)
    texture = np.kron(rng.integers(0, 256, (8, 16, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    return np.roll(texture, index * speed, axis=1)


def episodes_of(tmp_path: Path, draw: Callable[[int], np.ndarray], count: int, **options) -> list[tuple[int, ...]]:
    clip = write_clip(tmp_path / "clip.mp4", regular(count, 30), draw)
    return list(convert(clip, clip_options(**options), tmp_path / "out.mp4").episodes)


def test_a_clip_is_cut_where_the_scene_changes(tmp_path):
    def draw(index: int) -> np.ndarray:
        return scene(index, 1, seed=index >= 65)  # 2.17 s: frame 22 is the first that shows the other scene

    assert episodes_of(tmp_path, draw, 120, cut="scenes") == [(0, 22), (22, 40)]
    assert episodes_of(tmp_path, draw, 120, max_episode_s=1.2, min_episode_s=0.5) == [
        (0, 11),
        (11, 22),
        (22, 31),
        (31, 40),
    ]
    assert episodes_of(tmp_path, draw, 120, cut="scenes", min_episode_s=2) == [(0, 22)]
    assert episodes_of(tmp_path, draw, 120, cut="length", max_episode_s=2) == [(0, 20), (20, 40)]
    assert episodes_of(tmp_path, draw, 120, cut="none", max_episode_s=2) == [(0, 40)]


def test_still_stretches_are_left_out(tmp_path):
    def draw(index: int) -> np.ndarray:
        return scene(min(index, 60) + max(index - 150, 0), 2, seed=0)  # still from 2 s to 5 s

    assert episodes_of(tmp_path, draw, 210, max_episode_s=9, cut="length") == [(0, 70)]
    ((first, to), (again, end)) = episodes_of(tmp_path, draw, 210, cut="length", min_motion=8.0)
    # Kept is every frame of a pair, 0.5 s apart, that changes.
    assert (first, end) == (0, 70)
    assert 20 <= to <= 26
    assert 45 <= again <= 50


def test_episodes_of_nothing_but_still_frames():
    assert cut_episodes(np.zeros((40, 8)), [], clip_options(min_motion=1.0)) == []
    assert cut_episodes(np.zeros((1, 8)), [], clip_options(min_motion=1.0)) == []


def test_episodes_with_gaps_between_them_are_read_from_their_first_frame(tmp_path):
    """Also where that is no key frame, and its key frame is left out; in two clips that share a file."""
    clip = write_clip(tmp_path / "clip.mp4", regular(40, 10), lambda i: bars(i, 128, 64), rate=10)
    options, video_file, spans = clip_options(), tmp_path / "out.mp4", ((3, 9), (15, 20), (21, 30))
    part = replace(convert(clip, options, video_file), episodes=spans)
    clips = [video_dataset.Converted(clip, (task,) * 3, part, video_file) for task in ("one", "two")]
    video_dataset.write_dataset(tmp_path / "data", "data", CAMERA, clips, options)
    assert len(list((tmp_path / "data").rglob("*.mp4"))) == 1
    assert [read_bars(picture) for picture in pictures(tmp_path / "data")] == [i for s in 2 * spans for i in range(*s)]


# --- copies -----------------------------------------------------------------------------------------------------------


def packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as file:
        return [bytes(packet) for packet in file.demux(video=0) if packet.size]


def test_a_clip_that_fits_is_copied_bit_for_bit(tmp_path):
    """Beside one that is encoded, and with B-frames; LeRobot reads both."""
    (tmp_path / "clips").mkdir()
    fitting = write_clip(
        tmp_path / "clips" / "a.mkv", regular(40, 10), lambda i: bars(i, 128, 64), rate=10, bf="2", g="12"
    )
    write_clip(tmp_path / "clips" / "b.mkv", regular(40, 20), lambda i: bars(i, 128, 64), rate=20)
    assert run(tmp_path / "clips", "--root", tmp_path / "out", "--size", 128, "--cut", "none", "--task", "") == 0
    told = report(tmp_path / "out")
    assert LeRobotDataset("out", root=tmp_path / "out")[0]["task"] == ""
    assert (told["a.mkv"]["copied"], told["b.mkv"]["copied"]) == (True, False)
    first, second = sorted((tmp_path / "out" / "videos").rglob("*.mp4"))
    assert packets(first) != packets(second)
    with av.open(str(fitting)) as one, av.open(str(first)) as other:
        frames = list(zip(one.decode(video=0), other.decode(video=0), strict=True))
        assert [frame.time for _, frame in frames] == [index / 10 for index in range(40)]
        assert all(np.array_equal(a.to_ndarray(), b.to_ndarray()) for a, b in frames)
    assert packets(first) == packets(fitting)
    expected = list(range(40)) + [2 * index for index in range(20)]
    assert [read_bars(picture) for picture in pictures(tmp_path / "out")] == expected


@pytest.mark.parametrize(
    "options", [{"fps": 20}, {"frame": (32, 64)}, {"max_gop": 11}, {"max_gop": 0}, {"frame": (128, 128)}]
)
def test_what_does_not_fit_is_encoded(tmp_path, options):
    clip = write_clip(
        tmp_path / "a.mp4", regular(30, 10), lambda i: bars(i, 128, 64), rate=10, g="12", sc_threshold="0"
    )
    assert convert(clip, clip_options(), tmp_path / "out.mp4").copied
    assert not convert(clip, clip_options(**options), tmp_path / "out.mp4").copied


# --- what is skipped --------------------------------------------------------------------------------------------------


def test_broken_clips_are_skipped_and_listed(tmp_path, capsys):
    folder = tmp_path / "clips"
    folder.mkdir()

    def draw(index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 256, (64, 128, 3), np.uint8)

    whole = write_clip(folder / "whole.mp4", regular(60, 30), draw)
    with av.open(str(folder / "sound.mkv"), "w") as file:  # sound that is longer than the picture is no damage
        picture, sound = file.add_stream("libx264", rate=10), file.add_stream("pcm_s16le", rate=8000)
        picture.width = picture.height = 64
        for index in range(100):
            if index < 20:
                frame = av.VideoFrame.from_ndarray(draw(index)[:, :64], "rgb24")
                frame.pts, frame.time_base = index, Fraction(1, 10)
                file.mux(picture.encode(frame))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
            samples.sample_rate, samples.pts = 8000, 800 * index
            file.mux(sound.encode(samples))
        file.mux([*picture.encode(), *sound.encode()])
    for name, options in {"cut.mp4": {"container": {"movflags": "faststart"}}, "cut.mkv": {}, "cut.avi": {}}.items():
        clip = write_clip(folder / name, regular(90, 30), draw, **options)
        clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    (folder / "text.mp4").write_text("no video")
    (folder / "images").mkdir()
    for index in range(3):
        (folder / "images" / f"{index}.png").write_bytes(b"no image")
    write_clip(folder / "short.mp4", regular(6, 30), draw)
    assert run(folder, "--root", tmp_path / "out", "--image-fps", 10) == video.SKIPPED
    broken = {"cut.mp4", "cut.mkv", "cut.avi", "text.mp4", "images"}
    told = report(tmp_path / "out")
    assert {name for name, line in told.items() if "broken" in line} == broken
    assert told["short.mp4"]["episodes"] == {}
    assert len(told["whole.mp4"]["episodes"]) == len(told["sound.mkv"]["episodes"]) == 1
    printed = capsys.readouterr().out
    assert "5 of 8 clips are broken" in printed
    assert all(f"{folder / name}: " in printed for name in broken)
    with pytest.raises(ValueError, match=r"no clip gives an episode:\n.*short.mp4: no episode"):
        run(folder / "short.mp4", "--root", tmp_path / "other")
    with pytest.raises(ValueError, match=r"none of 1 clips can be read, such as .*text.mp4: Invalid data"):
        run(folder / "text.mp4", "--root", tmp_path / "another")
    assert whole.exists()


@pytest.mark.slow
def test_a_killed_command_goes_on(server, tmp_path):
    """Finished clips are not converted again, no worker survives, and the dataset is that of a command left alone."""
    (tmp_path / "clips").mkdir()
    for index in range(8):
        write_clip(
            tmp_path / "clips" / f"{index}.mp4", regular(300, 30), lambda i, s=index: scene(i, 1, s), preset="ultrafast"
        )
    command = ["-m", "smolvla_shared.video", tmp_path / "clips", "--num-workers", "2", "--root"]
    work, output = tmp_path / "killed.unfinished", tmp_path / "killed.txt"
    process = Forked(server, [*command, tmp_path / "killed"], output)
    process.wait_for(lambda: len(list(work.glob("parts/*.json"))) >= 2)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    done = {path: path.stat().st_mtime_ns for path in work.glob("parts/*.mp4") if path.with_suffix(".json").exists()}
    assert 2 <= len(done) < 8
    assert not (tmp_path / "killed").exists()
    with pytest.raises(ValueError, match=r"other options(.|\n)* fps: asked for 5, found 10"):
        run(tmp_path / "clips", "--root", tmp_path / "killed", "--fps", 5)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    changed = next(clip for clip in (tmp_path / "clips").iterdir() if video.video_of(work, clip) in done)
    os.utime(changed)  # this one may be another clip by now

    code, printed = run_forked(server, [*command, tmp_path / "killed"], output)
    assert code == 0, printed
    assert f"{len(done) - 1} of 8 clips were converted before" in printed
    code, printed = run_forked(server, [*command, tmp_path / "alone"], tmp_path / "alone.txt")
    assert code == 0, printed
    assert "before" not in printed
    contents = [
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "killed", tmp_path / "alone")
    ]
    assert contents[0] == contents[1]
    assert names_in(tmp_path) == ["alone", "alone.txt", "clips", "killed", "killed.txt"]


def test_a_worker_that_is_killed_stops_the_command():
    config = video.VideoConfig(clips=(), root=Path(), num_workers=1)
    with tqdm(total=1) as bar, pytest.raises(ValueError, match=r"a worker process was killed.* with 9: .*goes on"):
        list(video.in_workers(os._exit, {9: ()}, config, bar, seconds=False))


def test_a_full_disk_is_no_broken_clip(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", regular(60, 30), lambda i: scene(i, 1, 0))
    (tmp_path / "out.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="the disk is full"):
        attempt(convert, clip, clip_options(), tmp_path / "out.mp4")
    assert names_in(tmp_path) == ["clip.mp4"]


# --- tasks ------------------------------------------------------------------------------------------------------------


def tasks(clips: list[Path], *options: str | Path) -> dict[str, str]:
    config = video.VideoConfig(clips=(), root=Path(), **dict(zip(options[::2], options[1::2])))
    return {clip.name: one.text for clip, [one] in video.task_texts(clips, config).items()}


def test_tasks_by_pattern_and_by_captions(tmp_path, capsys):
    clips = [tmp_path / "open_the_door" / name for name in ("12.webm", "a_b.mp4", "c.mp4")]
    assert set(tasks(clips).values()) == {"open the door"}
    assert tasks(clips, "task", "{folder}: {stem}!")["a_b.mp4"] == "open the door: a b!"
    assert set(tasks(clips, "task", "").values()) == {""}
    rows = [{"id": "12", "label": "Öffnen", "template": "x"}, {"id": "a_b.mp4", "label": "pull, push"}]
    (tmp_path / "c.json").write_text(json.dumps(rows))
    with (tmp_path / "c.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for name in ("c.json", "c.csv"):
        expected = {"12.webm": "Öffnen", "a_b.mp4": "pull, push"}
        assert tasks(clips, "captions", tmp_path / name) == expected
        assert "1 of 3 clips have no caption and are left out" in capsys.readouterr().out
    assert tasks(clips, "captions", tmp_path / "c.json", "task", "Do: {caption}")["12.webm"] == "Do: Öffnen"
    (tmp_path / "wrong.csv").write_text("name,text\n12,x\n")
    (tmp_path / "twice.json").write_text(json.dumps([rows[0], rows[0] | {"label": "other"}]))
    (tmp_path / "none.json").write_text(json.dumps([{"id": "13", "label": "x"}]))
    (tmp_path / "number.json").write_text("12")
    (tmp_path / "object.json").write_text(json.dumps({"id": "12", "label": "x"}))
    (tmp_path / "other.json").write_text(json.dumps({"videos": {"12": {"narrations": []}}}))
    (tmp_path / "list.json").write_text(json.dumps({"videos": [{"video_uid": "12", "clips": []}]}))
    (tmp_path / "key.json").write_text(json.dumps({"12": {"narration_pass_1": {"narrations": [{"time": 1}]}}}))
    (tmp_path / "late.csv").write_text("id,label,start_s,end_s\n12,x,4,3\n")
    (tmp_path / "never.json").write_text(json.dumps([rows[0] | {"start_s": 1}, {"id": "a_b", "label": "x"}]))
    (tmp_path / "word.csv").write_text("id,label,start_s\n12,x,soon\n")
    for name, message in {
        "wrong.csv": "found .*name.*text",
        "twice.json": "two texts for 12",
        "none.json": "no clip has a caption; the first clip is 12.webm, the first caption is of 13",
        "missing.json": "No such file",
        "number.json": r"should be a JSON list .* or Ego4D's narration.json; found 12",
        "object.json": r'Ego4D\'s narration.json; found \{"id": "12"\}',
        "other.json": r'narration.json; found \{"12": \{"narrations": \[\]\}\}',
        "list.json": r"narration.json; found \[\{\"video_uid\": \"12\"",
        "key.json": r'narration.json; found \{"12": \{"narration_pass_1": \{"narrations": \[\{"time": 1\}',
        "late.csv": r"every row needs a `start_s`, and no `end_s` before it; found .*4",
        "never.json": r"every row needs a `start_s`, .* found \{\"id\": \"a_b\"",
        "word.csv": r"every row needs a `start_s`, .* found .*soon",
    }.items():
        with pytest.raises(ValueError, match=message):
            tasks(clips, "captions", tmp_path / name)


def told(root: Path) -> dict[str, list[tuple[int, str]]]:
    """For each clip, the number that the first frame of each episode shows, and the episode's task."""
    dataset, found = LeRobotDataset(root.name, root=root), {}
    numbers = [read_bars(picture) for picture in pictures(root)]
    for name, line in report(root).items():
        rows = [dataset.meta.episodes[int(episode)]["dataset_from_index"] for episode in line["episodes"]]
        found[name] = [(numbers[row], dataset[row]["task"]) for row in rows]
        lasts = [dataset.meta.episodes[int(episode)]["dataset_to_index"] - 1 for episode in line["episodes"]]
        assert [dataset[row]["task"] for row in lasts] == [text for _, text in found[name]] == line.get("tasks", [])
    return found


def test_an_episode_has_the_narration_of_its_time(tmp_path, capsys):
    """Ego4D's file, of both narrators. A frame shows its number at 10 frames a second, so 20 is 2 s after the start."""
    (tmp_path / "clips").mkdir()
    for name in ("long", "late", "none", "redacted"):
        write_clip(tmp_path / "clips" / f"{name}.mp4", regular(80, 10), lambda i: bars(i, 128, 64), rate=10, g="1")

    def passes(*texts: tuple[float | None, str | None]) -> dict:
        rows = [{"timestamp_sec": at, "timestamp_frame": 0, "narration_text": text} for at, text in texts]
        return {"narrations": rows, "summaries": [{"start_sec": 0, "end_sec": 8, "summary_text": "#Summary C cooks"}]}

    first = passes((2.2, "#c c looks"), (2.9, "#C C  opens a drawer"), (1.9, "#C C stops "), (0.2, "#C C walks"))
    second = passes((3.8, "#O a man X picks a #Unsure"), (None, "#C C sings"), (5.0, "#C C"), (7.99, "#C C closes it"))
    record = {"long": {"narration_pass_1": first, "narration_pass_2": second, "status": "complete"}}
    record |= {"late": {"narration_pass_1": passes((4.0, "C cuts"), (5.0, "Cuts the #9 wire"))}}
    record |= {"redacted": {"status": "redacted"}, "elsewhere": {"narration_pass_2": passes((1, "#C C runs"))}}
    for name, content in {"plain": record, "wrapped": {"version": "v2", "videos": record}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        options = ["--size", 128, "--cut", "length", "--max-episode-s", 2, "--task", "I see: {caption}"]
        captions = ["--captions", tmp_path / f"{name}.json"]
        assert run(tmp_path / "clips", "--root", tmp_path / name, *options, *captions) == 0
        assert told(tmp_path / name) == {
            "long.mp4": [
                (0, "I see: walks"),  # 0.2 s is 0.8 s from the middle, 1.9 s is 0.9 s
                (20, "I see: opens a drawer"),
                (40, "I see: a man X picks a something"),  # nothing in it: the last before
                (60, "I see: closes it"),
            ],
            "late.mp4": [(40, "I see: Cuts the #9 wire"), (60, "I see: Cuts the #9 wire")],  # nothing before 4 s
        }
        printed = capsys.readouterr().out
        assert "2 of 11 narrations have no text or no time and are not read" in printed
        assert "2 of 4 clips have no caption and are left out, such as" in printed
        assert "2 of 8 episodes have no caption and are left out" in printed


def test_texts_of_stretches_end_where_they_say(tmp_path, capsys):
    """A CSV file and the same as JSON. Scene changes at 3 s and 5 s, where the seed of the picture changes."""
    (tmp_path / "clips").mkdir()
    for name in ("a", "b"):
        write_clip(
            tmp_path / "clips" / f"{name}.mp4", regular(90, 10), lambda i: scene(i, 1, (i >= 30) + (i >= 50)), rate=10
        )
    stretches = [("a", 0, 3.4, "one"), ("a", 3.2, 4.2, "two"), ("a", 8.9, None, "three")]
    stretches += [("b", 9, 12, "after the end"), ("c", 0, 1, "of no clip")]
    rows = [{"id": name, "label": text, "start_s": start, "end_s": end} for name, start, end, text in stretches]
    (tmp_path / "c.json").write_text(json.dumps(rows))
    with (tmp_path / "c.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for name in ("c.json", "c.csv"):
        root = tmp_path / f"of_{name}"
        assert run(tmp_path / "clips", "--root", root, "--captions", tmp_path / name) == 0
        line = report(root)
        # 3 s to 5 s: its middle is in "two", and "one" ended 0.6 s before. 5 s to 9 s: "three" begins in it.
        assert list(line["a.mp4"]["episodes"].values()) == [[0, 30], [30, 50], [50, 90]]
        assert line["a.mp4"]["tasks"] == ["one", "two", "three"]
        assert line["b.mp4"]["episodes"] == {}
        assert "1 clips gave no episode, too short, too still or without a caption in time" in capsys.readouterr().out
    (tmp_path / "late.json").write_text(json.dumps(rows[3:]))
    with pytest.raises(ValueError, match=r"no clip gives an episode:\n.*b.mp4: no caption in time"):
        run(tmp_path / "clips" / "b.mp4", "--root", tmp_path / "out", "--captions", tmp_path / "late.json")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{file}", r"\['file'\] unknown, there are \['folder', 'stem'\]"),
        ("{caption}", "needs --captions"),
        ("{", "--task '{': "),
        ("{folder:d}", "--task '{folder:d}': folder is a text and takes no format: write {folder}"),
        ("{stem!z}", "stem is a text and takes no format"),
    ],
)
def test_an_unknown_pattern_is_refused(tmp_path, pattern, message):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "a.mp4", "--root", tmp_path / "out", "--task", pattern)
    assert names_in(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 16}, "--size 16: .* at least 32"),
        ({"size": 101}, "must be even"),
        ({"fps": 0}, "--fps must be at least 1 and at most 1,000, got 0"),
        ({"image_fps": 0}, "--image-fps must be at least 1 and at most 1,000, got 0"),
        ({"min_motion": float("nan")}, "--min-motion must be at least 0 and at most 255 and finite, got nan"),
        ({"max_episode_s": 0.5}, "less than --min-episode-s"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        video.VideoConfig(clips=(), root=Path(), **options)


def test_a_pipe_is_no_clip_and_the_dataset_is_not_among_the_clips(tmp_path):
    """FFmpeg would wait for the pipe for ever, and a second run take the dataset's videos for clips."""
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(ValueError, match=r"pipe.mp4 is neither a file nor a folder: name clips"):
        video.main([str(tmp_path / "pipe.mp4"), "--root", str(tmp_path / "new")])
    with pytest.raises(ValueError, match=r"--root .*/new/dataset is in .*, which is searched for clips"):
        video.main([str(tmp_path), "--root", str(tmp_path / "new" / "dataset")])
    assert [path.name for path in tmp_path.iterdir()] == ["pipe.mp4"]


def test_no_clips_and_an_existing_root_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").touch()
    for clips, message in {"empty": "no clips in .*mp4", "nowhere": "there is no .*nowhere"}.items():
        with pytest.raises(ValueError, match=message):
            run(tmp_path / clips, "--root", tmp_path / "out")
    with pytest.raises(ValueError, match="empty exists: remove it"):
        run(tmp_path, "--root", tmp_path / "empty")
    assert names_in(tmp_path) == ["empty"]
