"""Rows of datasets in the memory of their episodes: as ranges, and in a random order that is computed, not kept."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Rows:
    """Sorted rows of a dataset as ranges, each inside one episode: the memory of an episode, not of its frames.

    rows[places] are the rows at these places, [n] -> [n].
    """

    start: np.ndarray  # [R]
    end: np.ndarray  # [R], one after the last

    @cached_property
    def until(self) -> np.ndarray:  # [R]: rows in the ranges up to and with each
        return np.cumsum(self.end - self.start)

    def __len__(self) -> int:
        return int(self.until[-1]) if len(self.until) else 0

    def range_of(self, places: np.ndarray) -> np.ndarray:  # [n] -> [n]
        return np.searchsorted(self.until, places, side="right")

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        ranges = self.range_of(places)
        return places + (self.end - self.until)[ranges]

    def numpy(self) -> np.ndarray:
        """All rows, 8 bytes each."""
        return self[np.arange(len(self))]


@dataclass(frozen=True)
class RowGroup:
    """Rows that get a fixed share of every step's slots."""

    rows: Rows  # the ranges of one dataset after those of another
    dataset: np.ndarray  # [R]: dataset index of each range
    share: float = 1.0

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, places: np.ndarray) -> list[tuple[int, int]]:
        """(dataset index, row) at each of these places."""
        datasets = self.dataset[self.rows.range_of(places)]
        return list(zip(datasets.tolist(), self.rows[places].tolist()))


def group_rows(rows_of: list[tuple[int, Rows]], share: float = 1.0) -> list[RowGroup]:
    """A list of (dataset index, rows) as one group; no group for an empty list."""
    if not rows_of:
        return []
    start, end = (np.concatenate([getattr(rows, name) for _, rows in rows_of]) for name in ("start", "end"))
    dataset = np.concatenate([np.full(len(rows.start), index) for index, rows in rows_of])
    return [RowGroup(Rows(start, end), dataset, share)]


# Rounds of the Feistel network, half of them for each half of the bits. With 12, but not with 8, all 120 orders of five
# rows come equally often.
ROUNDS = 12


def shuffled(places: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:  # [n] -> [n]
    """Where each place of [0, size) is in a random order that is a function of the key. The order is never in memory.

    A Feistel network is a bijection of the numbers of some bits. Numbers that leave [0, size) go through it again until
    they come back (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    bits = max(2, (size - 1).bit_length())  # at most half of the numbers are outside, if size > 2
    low = np.uint64(bits // 2)
    keys = np.random.default_rng(key).integers(2**64, size=(ROUNDS, 1), dtype=np.uint64)
    order = np.array(places, dtype=np.uint64)
    outside = np.arange(len(order))
    while len(outside):
        left, right = order[outside] >> low, order[outside] & (np.uint64(1) << low) - np.uint64(1)
        for even, odd in zip(keys[::2], keys[1::2]):
            left ^= hashed(right + even) >> np.uint64(64 - (bits - bits // 2))
            right ^= hashed(left + odd) >> np.uint64(64 - bits // 2)
        order[outside] = left << low | right
        outside = outside[order[outside] >= size]
    return order.astype(np.int64)


def hashed(x: np.ndarray) -> np.ndarray:  # uint64 -> uint64
    """The mixing function of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
