"""cache.py: shards survive a kill, keys tell one dataset, one option from another, arrays are what was written."""

import json
import shutil

import numpy as np
import pytest

from smolvla_shared.cache import MANIFEST, RowCache, dataset_fingerprint

KEY = {"teacher_id": "abc", "frame_gap_s": 0.5, "versions": {"torch": "2.11"}}


def rows_of(rows: range) -> dict[str, np.ndarray]:
    values = np.arange(rows.start, rows.stop)
    return {"codes": np.stack([values % 8, values % 3], 1).astype(np.uint8), "mask": values % 5 > 0}


def fill(cache: RowCache, stop_after: int | None = None) -> int:
    """Write what is missing; returns how many shards."""
    cache.claim()
    missing = cache.missing()[:stop_after]
    for rows in missing:
        cache.write(rows, rows_of(rows))
    if stop_after is None:
        cache.finish()
    return len(missing)


def test_what_was_written_is_read(tmp_path):
    cache = RowCache(tmp_path / "a", KEY, num_rows=25, shard_rows=10)
    assert not cache.is_complete()
    assert fill(cache) == 3
    assert cache.is_complete()
    arrays = cache.open()
    for name, expected in rows_of(range(25)).items():
        assert arrays[name].dtype == expected.dtype
        assert np.array_equal(arrays[name], expected)
    assert isinstance(arrays["codes"], np.memmap)
    assert sorted(path.name for path in cache.directory.iterdir()) == [MANIFEST, "codes.npy", "mask.npy"]


def test_finished_shards_are_not_computed_again(tmp_path):
    cache = RowCache(tmp_path / "a", KEY, num_rows=25, shard_rows=10)
    assert fill(cache, stop_after=2) == 2
    (cache.directory / "shards" / "000002.99.tmp").write_bytes(b"torn")  # what a kill leaves behind
    with pytest.raises(ValueError, match=r"not complete \(2 of 3 shards\): run the command that fills it again"):
        cache.open()
    assert fill(cache) == 1
    assert np.array_equal(cache.open()["mask"], rows_of(range(25))["mask"])


def test_shards_that_a_kill_at_the_very_end_left_are_removed(tmp_path, monkeypatch):
    cache = RowCache(tmp_path / "a", KEY, num_rows=25, shard_rows=10)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        fill(cache)
    assert (cache.directory / "shards").is_dir()
    assert cache.is_complete()
    assert sorted(path.name for path in cache.directory.iterdir()) == [MANIFEST, "codes.npy", "mask.npy"]


@pytest.mark.parametrize("when", ["unfinished", "complete"])
def test_another_key_is_refused_with_both_sides(tmp_path, when):
    fill(RowCache(tmp_path / "a", KEY, 25, 10), stop_after=1 if when == "unfinished" else None)
    other = RowCache(tmp_path / "a", KEY | {"frame_gap_s": 0.25, "camera": "top"}, 26, 10)
    for act in (other.claim, other.open):
        with pytest.raises(ValueError) as error:
            act()
        assert str(error.value).splitlines()[1:] == [
            "  camera: asked for top, found None",
            "  frame_gap_s: asked for 0.25, found 0.5",
            "  rows: asked for 26, found 25",
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
    file = cache.directory / "codes.npy"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"codes.npy is damaged, fill the cache again"):
        cache.open()


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
