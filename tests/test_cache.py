"""cache.py: shards survive a kill, keys tell datasets and options apart, rows are what was written."""

import json
import shutil
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from smolvla_shared import cache as cache_module
from smolvla_shared.cache import MANIFEST, RowCache, dataset_directories
from smolvla_shared.hashes import dataset_fingerprint

KEY = {"teacher_id": "abc", "frame_gap_s": 0.5, "versions": {"torch": "2.11"}}


def values_of(rows: range) -> torch.Tensor:
    """In bfloat16, which NumPy does not have: 1/8 of (i, i + 1, i + 2) for row i."""
    return (torch.arange(rows.start, rows.stop)[:, None] + torch.arange(3)).bfloat16() / 8


def fill(cache: RowCache, stop_after: int | None = None) -> int:
    """Write what is missing; returns how many shards."""
    cache.claim()
    missing = cache.missing()[:stop_after]
    for rows in missing:
        cache.write(rows, values_of(rows))
    cache.release()
    return len(missing)


def files(cache: RowCache) -> list[str]:
    return sorted(str(path.relative_to(cache.directory)) for path in cache.directory.rglob("*") if path.is_file())


def test_what_was_written_is_read(tmp_path):
    cache = RowCache(tmp_path / "a", KEY, num_rows=25, shard_rows=10)
    assert not cache.is_complete()
    assert fill(cache) == 3
    assert cache.is_complete()
    cache.open()
    for row in [24, 0, 9, 10, 19, 20, 3]:
        assert cache[row].dtype == torch.bfloat16
        assert cache[row].tolist() == [row / 8, (row + 1) / 8, (row + 2) / 8]
    assert files(cache) == [MANIFEST, *(f"shards/00000{shard}.safetensors" for shard in range(3))]
    assert len({path.stat().st_mode for path in cache.directory.rglob("*") if path.is_file()}) == 1  # others may read


def test_a_row_is_read_and_not_its_shard(tmp_path):
    """Of a mapped shard of 64 MB only the pages around the row get into the process's memory."""
    cache = RowCache(tmp_path / "a", KEY, num_rows=1024, shard_rows=1024)
    cache.claim()
    cache.write(range(1024), torch.ones(1024, 1 << 14))
    path = str(next(cache.directory.rglob("*.safetensors")))
    cache.open()
    assert cache[500].sum() == 1 << 14
    lines = Path("/proc/self/smaps").read_text().splitlines()
    mapping = lines[next(i for i, line in enumerate(lines) if line.endswith(path)) :]
    assert int(next(line for line in mapping if line.startswith("Rss:")).split()[1]) < 4096  # kB


def test_files_stay_mapped_up_to_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "read_mapped", lru_cache(maxsize=4)(cache_module.read_mapped.__wrapped__))
    cache = RowCache(tmp_path / "a", KEY, num_rows=25, shard_rows=1)
    fill(cache)
    cache.open()
    assert [cache[row][0].item() for row in range(25)] == [row / 8 for row in range(25)]
    assert Path("/proc/self/maps").read_text().count(str(cache.directory)) <= 4


def test_finished_shards_are_not_computed_again(tmp_path):
    cache = RowCache(tmp_path / "a", KEY, num_rows=25, shard_rows=10)
    assert fill(cache, stop_after=2) == 2
    (cache.directory / "shards" / "000002.99.safetensors.tmp").write_bytes(b"torn")  # what a kill leaves behind
    with pytest.raises(ValueError, match=r"not complete \(2 of 3 shards\): run the command that fills it again"):
        cache.open()
    assert fill(cache) == 1
    cache.open()
    assert cache[24].tolist() == values_of(range(24, 25))[0].tolist()


def test_a_kill_at_the_very_start_leaves_a_place_for_the_cache(tmp_path):
    cache = RowCache(tmp_path / "a", KEY, num_rows=25, shard_rows=10)
    cache.directory.mkdir()
    (cache.directory / f"{MANIFEST}.tmp").write_text('{"key')
    assert fill(cache) == 3
    cache.open()


@pytest.mark.parametrize("when", ["unfinished", "complete"])
def test_another_key_is_refused_with_both_sides(tmp_path, when):
    fill(RowCache(tmp_path / "a", KEY, 25, 10), stop_after=1 if when == "unfinished" else None)
    other = RowCache(tmp_path / "a", KEY | {"frame_gap_s": 0.25, "camera": "top"}, 26, 5)
    for act in (other.claim, other.open):
        with pytest.raises(ValueError) as error:
            act()
        assert str(error.value).splitlines()[1:] == [
            "  camera: asked for top, found None",
            "  frame_gap_s: asked for 0.25, found 0.5",
            "  rows: asked for 26, found 25",
            "  shard_rows: asked for 5, found 10",
        ]


def test_what_is_missing_or_damaged_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no cache at .*/a; beside it: nothing"):
        RowCache(tmp_path / "a", KEY, 25, 10).open()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds something that is no cache"):
        RowCache(tmp_path / "mine", KEY, 25, 10).claim()
    cache = RowCache(tmp_path / "a", KEY, 25, 10)
    fill(cache)
    shard = cache.directory / "shards" / "000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"000001.safetensors is damaged .*: remove it and run the command .* again"):
        cache.open()
    shard.unlink()
    assert fill(cache) == 1
    cache.open()
    assert cache[15].tolist() == values_of(range(15, 16))[0].tolist()


def test_datasets_of_one_name_are_refused(tmp_path):
    assert dataset_directories(tmp_path, ["a/x/y", "b/x/z"]) == [tmp_path / "x--y", tmp_path / "x--z"]
    with pytest.raises(ValueError, match=r"a/x/y and b/x/y would share .*/x--y, .*: rename a directory .* \(ln -s\)"):
        dataset_directories(tmp_path, ["a/x/y", "c", "b/x/y"])
    link = tmp_path / "x" / "other"
    assert dataset_directories(tmp_path, ["a/x/y", str(link)]) == [tmp_path / "x--y", tmp_path / "x--other"]
    # Demonstrations that are video, too, are one dataset.
    assert dataset_directories(tmp_path, ["a/x/y", "a/x/y"]) == [tmp_path / "x--y"] * 2


def test_a_fingerprint_tells_datasets_apart_but_not_their_places(tmp_path, video_dataset, labelled_dataset):
    copied = shutil.copytree(video_dataset, tmp_path / "elsewhere")
    assert dataset_fingerprint(copied) == dataset_fingerprint(video_dataset) != dataset_fingerprint(labelled_dataset)
    info = json.loads((copied / "meta" / "info.json").read_text())
    (copied / "meta" / "info.json").write_text(json.dumps(info | {"fps": 21}))
    assert dataset_fingerprint(copied) != dataset_fingerprint(video_dataset)
    shutil.copy(video_dataset / "meta" / "info.json", copied / "meta" / "info.json")
    assert dataset_fingerprint(copied) == dataset_fingerprint(video_dataset)
    video = next((copied / "videos").rglob("*.mp4"))
    with video.open("r+b") as file:  # same size, other pictures
        file.seek(-20, 2)
        file.write(bytes(20))
    assert dataset_fingerprint(copied) != dataset_fingerprint(video_dataset)
