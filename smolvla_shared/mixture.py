"""A mixture of unlike datasets in a YAML file (--data.mixture): each has its own share, cameras and frame pairs.

datasets:
  - root: data/my_video                 # a local directory, from the current one; or repo_id: a hub id
    cameras:                            # the policy's name of a camera: the dataset's own
      observation.images.front: observation.image
    weight: 3
  - repo_id: lerobot/droid_100
    cameras:
      observation.images.front: observation.images.exterior_1_left
      observation.images.wrist: observation.images.wrist_left
    weight: 1
    frame_gap_s: 0.4
    robot: panda                        # for all datasets that have a state or actions, or for none
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from smolvla_shared import paths, ranges
from smolvla_shared.refusals import decode, shown


@dataclass(frozen=True)
class DatasetEntry:
    """A dataset of a run, and what is its own. The fields are those of the YAML file."""

    # A local directory, or a hub id: one of the two.
    root: paths.DatasetName | None = None
    repo_id: str | None = None
    # How much of a batch it is, relative to the others.
    weight: ranges.Positive | None = None
    # {the policy's name of a camera: the dataset's own}. None: every camera under its own name.
    cameras: dict[str, str] | None = None
    # The cameras whose frame pairs the teacher sees, as the dataset calls them. None: the label cameras of the run.
    label_cameras: tuple[str, ...] | None = None
    # Time between the frames of a pair, seconds. None: that of the run.
    frame_gap_s: ranges.Positive | None = None
    # The robot that it is of: each robot has its own widths and statistics of state and actions. None: in the run, all
    # are of one.
    robot: str | None = None

    def __post_init__(self):
        if (self.root is None) == (self.repo_id is None):
            raise ValueError(
                f"a dataset has a root or a repo_id, this one has root {self.root}, repo_id {self.repo_id}"
            )
        if self.robot is not None and not re.fullmatch(r"\w[\w.-]*", self.robot):
            raise ValueError(f"robot of {self.name}: a name of letters, digits, and . _ - within, got {self.robot!r}")
        if self.label_cameras is not None:
            if not self.label_cameras:
                raise ValueError(f"label_cameras of {self.name} are empty: name at least one, or leave them out")
            ranges.refuse_twice(f"label_cameras of {self.name}", self.label_cameras)
        if self.cameras is not None:
            if not self.cameras:
                raise ValueError(f"cameras of {self.name} are empty: name at least one, or leave cameras out")
            ranges.refuse_twice(f"cameras of {self.name}", self.cameras.values())
            if not all(name.strip() for pair in self.cameras.items() for name in pair):
                raise ValueError(f"cameras of {self.name} has an empty name: write the policy's and the dataset's")

    @property
    def name(self) -> str:
        """Its repo id or path, as the user wrote it."""
        return self.repo_id or str(self.root)


class _Loader(yaml.SafeLoader):
    """PyYAML takes the last of equal keys, as if the others had not been written, and a few lines of references to
    references (`*name`) for more than a machine can hold.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"*{self.peek_event().anchor} refers to another place: write it out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, count in counts.items() if count > 1]:
            raise yaml.YAMLError(f"{', '.join(twice)} twice in one place,{node.start_mark}")
        return super().construct_mapping(node, deep)


def read_mixture(path: Path) -> tuple[DatasetEntry, ...]:
    """The datasets of a mixture file. Raises ValueError for anything else than what the module's docstring shows."""
    paths.check_file(path, "the mixture")
    try:
        content = yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise ValueError(f"the mixture {path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the mixture {path} is not YAML: {error}") from error
    if not isinstance(content, dict) or [*content] != ["datasets"] or not isinstance(content["datasets"], list):
        raise ValueError(f"the mixture {path} should hold one list, `datasets:`, it holds {shown(content)}")
    defaults = {field.name: field.default for field in fields(DatasetEntry)}
    entries = tuple(
        decode(DatasetEntry, defaults | entry if isinstance(entry, dict) else entry, f"{path}, dataset {number}")
        for number, entry in enumerate(content["datasets"], start=1)
    )
    if not entries:
        raise ValueError(f"the mixture {path} names no dataset")
    ranges.refuse_twice(f"the mixture {path}", [entry.name for entry in entries])
    weighted = [entry.name for entry in entries if entry.weight]
    if weighted and len(weighted) < len(entries):
        raise ValueError(
            f"the mixture {path} gives a weight to {', '.join(weighted)} only: give one to all, or to none"
        )
    return entries


def plain_entries(
    repo_ids: tuple[str, ...], roots: tuple[Path, ...], weights: tuple[float, ...] = ()
) -> tuple[DatasetEntry, ...]:
    """Datasets without anything of their own but, with weights, one for each: hub ids, then roots."""
    named = [{"repo_id": name} for name in repo_ids] + [{"root": str(root)} for root in roots]
    return tuple(DatasetEntry(**name, weight=w) for name, w in zip(named, weights or (None,) * len(named), strict=True))


def camera_names(entries: Iterable[DatasetEntry]) -> tuple[str, ...]:
    """The policy's names of cameras that the entries map, in their order; (): none maps any."""
    return tuple(dict.fromkeys(name for entry in entries for name in entry.cameras or ()))


def policy_names(entries: Iterable[DatasetEntry], cameras: Iterable[str]) -> tuple[str, ...]:
    """The policy's names of cameras that a dataset, or a teacher that was trained on it, calls by its own names."""
    names, mapped = camera_names(entries), [pair for entry in entries for pair in (entry.cameras or {}).items()]
    found = {own: name for name, own in reversed(mapped)}
    return tuple(camera if camera in names else found.get(camera, camera) for camera in cameras)
