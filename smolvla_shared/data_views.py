"""Which cameras the datasets of a run show, under the policy's names: chosen, said in a table, or refused."""

from itertools import zip_longest
from typing import Any

from smolvla_shared import data, data_problems
from smolvla_shared.config import DataConfig
from smolvla_shared.data import ACTION_KEY, STATE_KEY, RobotDataset, open_datasets
from smolvla_shared.mixture import camera_names

MISSING = "- (masked)"


def open_recordings(
    config: DataConfig, of_video: DataConfig | None, starts_elsewhere: bool
) -> tuple[list[RobotDataset], list[RobotDataset]]:
    """The labelled datasets; these and the video datasets, whose actions are hidden.

    Raises ValueError for what refuse_named refuses; for a labelled one without actions; and for labelled ones of
    different rates: equal actions would be different motions, and chunks of different lengths in time.
    """
    labelled, video = open_datasets(config), open_datasets(of_video) if of_video else []
    for dataset in labelled:
        if ACTION_KEY not in dataset.features:
            raise ValueError(
                f"{dataset.name} has no {ACTION_KEY!r} column, it has {sorted(dataset.features)}: Stage 3 learns "
                "from labelled demonstrations; action-free video goes into --video-roots"
            )
    rates = {dataset.name: dataset.fps for dataset in labelled}
    if len(set(rates.values())) > 1:
        said = ", ".join(f"{name}: {fps:g}" for name, fps in rates.items())
        raise ValueError(
            f"the labelled datasets have different rates, they cannot share a policy: {said} actions a second. Train "
            "on those of one rate; the others may be --video-roots"
        )
    for dataset in video:
        dataset.hide_actions()
    refuse_named(labelled + video, config, starts_elsewhere)
    return labelled, labelled + video


def open_video(config: DataConfig, starts_elsewhere: bool = True) -> list[RobotDataset]:
    """Datasets whose actions are not read. Raises ValueError for what refuse_named refuses."""
    datasets = open_datasets(config)
    refuse_named(datasets, config, starts_elsewhere)
    return datasets


def refuse_named(datasets: list[RobotDataset], config: DataConfig, starts_elsewhere: bool) -> None:
    """Raise ValueError for the cameras and the frame gap that the user names, as far as they can be told wrong without
    what training starts from, and its labels: these take seconds to import.

    starts_elsewhere: whether a model to start from, or a teacher, may have cameras of its own
    """
    if config.cameras or not starts_elsewhere:
        choose_cameras(datasets, config, with_pairs=bool(config.label_cameras))
    if config.frame_gap_s:
        data.with_pairs(datasets, [(index, dataset.rows()) for index, dataset in enumerate(datasets)])


def choose_cameras(
    datasets: list[RobotDataset], config: DataConfig, named: bool = True, with_pairs: bool = True
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The policy's cameras, and the label cameras (() without pairs), by the policy's names.

    Default: the names in the mixture, else the cameras that all datasets have. A dataset may lack a camera that the
    user has named, in --data.cameras or in a mixture.

    named: whether config.cameras are the user's

    Raises ValueError for a camera that no dataset has, or not every dataset if it was not named; for a dataset that has
    none of them; and for one that lacks a label camera, or has another number of them.
    """
    views = {dataset.name: [*dataset.views] for dataset in datasets}
    common = [camera for camera in datasets[0].views if all(camera in known for known in views.values())]
    mapped = camera_names(dataset.entry for dataset in datasets)
    cameras = config.cameras or mapped or tuple(common)
    label_cameras = config.label_cameras or cameras[:1] if with_pairs else ()
    known = {camera for of in views.values() for camera in of} if mapped or (named and config.cameras) else {*common}
    own = [dataset.name for dataset in datasets if dataset.entry.label_cameras]
    unlabelled = [name for name in views if name not in own and not {*label_cameras} <= {*views[name]}]
    listing = "; ".join(f"{name}: {', '.join(of)}" for name, of in views.items())
    asked = (
        f"asked for {list(cameras) or 'all they share'}, label cameras {[*label_cameras] or 'none'}; found {listing}. "
    )
    if not cameras or any(camera not in known for camera in cameras):
        raise ValueError(
            f"every dataset must have every camera, or you name them; {asked}Pass --data.cameras (a dataset may lack "
            "some of these), or map names with --data.mixture"
        )
    if unlabelled:
        raise ValueError(
            f"every dataset must have the label cameras, but not {', '.join(unlabelled)}; {asked}"
            "Pass --data.label-cameras, or give them label_cameras of their own in --data.mixture"
        )
    counts = {d.name: len(d.label_views(label_cameras)) for d in datasets if label_cameras}
    if {*counts.values()} - {len(label_cameras)}:
        said = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(
            f"the run has {len(label_cameras)} label cameras ({', '.join(label_cameras)}), its datasets have {said}: "
            "name as many in --data.label-cameras as in the label_cameras of each dataset in --data.mixture"
        )
    if blind := [name for name, of in views.items() if not {*cameras} & {*of}]:
        raise ValueError(
            f"{', '.join(blind)} would show the policy nothing; {asked}Pass --data.cameras, or map names with "
            "--data.mixture"
        )
    data_problems.refuse_cameras(datasets, (*cameras, *label_cameras))
    return cameras, label_cameras


def unnamed_robots(datasets: list[RobotDataset]) -> list[str]:
    """A line if datasets of what LeRobot calls different robots share their statistics: no mixture names robots."""
    moving = [d for d in datasets if not d.entry.robot and {STATE_KEY, ACTION_KEY} & d.features.keys()]
    types = {d.name: d.info.robot_type for d in moving if d.info.robot_type}
    if len(set(types.values())) < 2:
        return []
    said = ", ".join(f"{name} {robot}" for name, robot in types.items())
    return [f"different robots share one set of statistics ({said}): name the `robot` of each in --data.mixture"]


def camera_table(datasets: list[RobotDataset], cameras: tuple[str, ...], start: tuple[str, ...] = ()) -> str:
    """A line for each dataset with its own names of the policy's cameras, and what is left out of each.

    start: the cameras of what training starts from, whose places they take
    """
    rows = [["camera of the policy", *cameras]]
    if start:
        rows.append(["starts as", *[place or "new" for _, place in zip(cameras, (*start, *[""] * len(cameras)))]])
    rows += [[d.name, *[d.views.get(camera, MISSING) for camera in cameras]] for d in datasets]
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    for dataset in datasets:
        read = {dataset.views.get(camera) for camera in cameras}
        if left := [camera for camera in dataset.camera_keys if camera not in read]:
            lines.append(f"{dataset.name}: the policy does not see {', '.join(left)} (name it with --data.cameras)")
    return "\n".join(lines)


def frame_shapes(datasets: list[RobotDataset], cameras: tuple[str, ...]) -> dict[str, tuple[int, int, int]]:
    """(3, height, width) of each camera, as the first dataset that has it recorded it."""
    having = {camera: next(dataset for dataset in datasets if camera in dataset.views) for camera in cameras}
    return {camera: dataset.frame_shape(dataset.views[camera]) for camera, dataset in having.items()}


def may_be_missing(labelled: list[RobotDataset], cameras: tuple[str, ...]) -> tuple[str, ...]:
    """The cameras that an observation may lack: those that a labelled dataset lacks.

    Raises ValueError if these are all: a robot must show the policy something.
    """
    lacking = {camera: [d.name for d in labelled if camera not in d.views] for camera in cameras}
    optional = tuple(camera for camera, names in lacking.items() if names)
    if optional == cameras:
        said = "; ".join(f"{camera} is not in {', '.join(names)}" for camera, names in lacking.items())
        raise ValueError(
            f"no camera is in all labelled datasets: {said}. Give one camera of each the same name in --data.mixture"
        )
    return optional


def gaps(datasets: list[RobotDataset]) -> dict[str, Any]:
    """The times between the frames of pairs, as they are used: that of the datasets without one of their own, or the
    smallest one if all have their own; and the others.
    """
    common = [d.frame_gap_s for d in datasets if not d.entry.frame_gap_s]
    used = sorted({d.frame_gap_s for d in datasets})
    first = common[0] if common else used[0]
    return {"frame_gap_s": first, "own_gaps_s": tuple(gap for gap in used if gap != first)}


def own_label_cameras(datasets: list[RobotDataset]) -> dict[str, Any]:
    """The label cameras of the datasets that have their own, by the dataset's name."""
    return {"own_label_cameras": {d.name: d.entry.label_cameras for d in datasets if d.entry.label_cameras}}


def pairs_source(datasets: list[RobotDataset], label_cameras: tuple[str, ...]) -> dict[str, Any]:
    """What a teacher's file records of the pairs that it was trained on."""
    own = sorted({d.frame_gap_s for d in datasets if d.entry.frame_gap_s})
    source = {"frame_gap_s": gaps(datasets)["frame_gap_s"], "label_cameras": [*label_cameras]}
    cameras = sorted({camera for d in datasets for camera in d.entry.label_cameras or ()})
    return source | ({"of_mixture": {"frame_gap_s": own, "label_cameras": cameras}} if own or cameras else {})
