"""The command `teacher check`: reads frame pairs, runs the teacher, and has label_health.py judge the latents."""

import collections
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from smolvla_shared import (
    data,
    data_blocks,
    data_table,
    data_values,
    data_views,
    label_health,
    label_pictures,
    label_probe,
    paths,
)
from smolvla_shared.data_rows import Rows, group_rows
from smolvla_shared.files import new_directory
from smolvla_shared.hashes import dataset_fingerprint
from smolvla_shared.labels import OnlineLabels
from smolvla_shared.laq import LAQ, pixel_error
from smolvla_shared.laq_files import load_laq, teachers_grounding, teachers_pairs, teachers_source
from smolvla_shared.preprocess import unit_range
from smolvla_shared.run_processes import check_shared_memory, make_worker_loader, use_tf32
from smolvla_shared.teacher_config import CheckConfig


def random_teacher(laq: LAQ, seed: int) -> LAQ:
    """A teacher of the same shape with random weights, on the same device."""
    torch.manual_seed(seed)
    with laq.vq.codebooks.device:
        return LAQ(laq.config).requires_grad_(False).eval()


def find_targets(
    datasets: list[data.RobotDataset], drawn: list[np.ndarray], config: CheckConfig
) -> dict[str, label_health.Target]:
    """Recorded motions over the gap of the drawn pairs, by name (label_probe.py): a target for each column of actions,
    and the displacement of the state.
    """
    found = collections.defaultdict(dict)  # name, A -> dataset -> [n, A]
    dimensions = {}

    def add(name: str, index: int, values: Tensor, key: str) -> None:
        found[name, values.shape[1]][index] = values
        dimensions.setdefault((name, values.shape[1]), label_probe.dimension_names(datasets[index], key))

    for index, (dataset, rows) in enumerate(zip(datasets, drawn)):
        rows, action = torch.from_numpy(rows), label_probe.action_key(dataset)
        if action:
            mode, reason = (config.actions, "--actions") if config.actions else label_probe.action_mode(dataset)
            meaning = {
                "sum": "velocities, summed over the gap",
                "change": "positions, whose change over the gap counts",
            }
            print(f"{dataset.name}: {action} are {meaning[mode]} ({reason})")
            add(action, index, label_probe.actions_over_gap(dataset, rows, mode), action)
        if data.STATE_KEY in dataset.features:
            add(label_probe.DISPLACEMENT, index, label_probe.displacements(dataset, rows), data.STATE_KEY)
    # Robots of other widths have targets of their own.
    several = collections.Counter(name for name, _ in found)
    names = {(name, width): f"{name} ({width})" if several[name] > 1 else name for name, width in found}
    return {names[place]: label_health.Target(fill(parts, drawn), dimensions[place]) for place, parts in found.items()}


def fill(parts: dict[int, Tensor], drawn: list[np.ndarray]) -> Tensor:
    """Values of some datasets [n, A] as rows of all datasets [N, A]; NaN for the other datasets."""
    width = next(iter(parts.values())).shape[1]
    nothing = [torch.full((len(rows), width), float("nan"), dtype=torch.float64) for rows in drawn]
    return torch.cat([parts.get(index, missing) for index, missing in enumerate(nothing)])


def unseen_rows(dataset: data.RobotDataset, grounded: dict[str, list[int]]) -> Rows:
    """Rows with pairs, without the episodes that grounded the teacher: the probe would flatter it on their actions.

    grounded: fingerprint of a dataset -> episodes that grounded the teacher
    """
    rows = dataset.rows_with_pairs(dataset.rows())
    known = grounded.get(dataset_fingerprint(dataset.root), []) if grounded else []
    unseen = ~np.isin(dataset.episode_of(rows.start), known)
    return Rows(rows.start[unseen], rows.end[unseen])


def draw_rows(datasets: list[data.RobotDataset], config: CheckConfig) -> list[np.ndarray]:
    """Sorted rows with pairs, drawn from each dataset in proportion to its number of them."""
    rng = np.random.default_rng(config.seed)
    grounding = teachers_source(config.laq_ckpt).get("grounding") or {"datasets": {}}
    grounded = {used["fingerprint"]: used["episodes"] for used in grounding["datasets"].values()}
    valid = [unseen_rows(dataset, grounded) for dataset in datasets]
    share = min(1.0, config.pairs / max(1, sum(map(len, valid))))
    return [rows[np.sort(rng.choice(len(rows), round(share * len(rows)), replace=False))] for rows in valid]


def teacher_frames(
    teacher: OnlineLabels, dataset: data.RobotDataset, rows: np.ndarray, num_workers: int
) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """Yields blocks of n rows; their frames at t - gap, t and t + gap as the teacher sees them, [n, V, 3, 3, H, W]; and
    whether the episode has each of these frames, [n, 3] bool.
    """
    blocks = data_blocks.episode_blocks(dataset, rows, size=64)
    frames = data_blocks.FrameBlocks(
        dataset, dataset.label_views(teacher.cameras), blocks, (-dataset.gap, 0, dataset.gap)
    )
    device = teacher.laq.vq.codebooks.device
    progress = tqdm(total=len(rows), desc=Path(dataset.name).name, unit="pair")
    loader = make_worker_loader(frames, num_workers)
    check_shared_memory(loader)
    for block, (images, places, has) in zip(blocks, loader):
        frames = [teacher.laq.resize(unit_range(of_camera.to(device)))[places.to(device)] for of_camera in images]
        yield block, torch.stack(frames, dim=1), has
        progress.update(len(block))
    progress.close()


@torch.no_grad()
def observe(
    teacher: OnlineLabels, datasets: list[data.RobotDataset], config: CheckConfig
) -> tuple[label_health.Observations, Tensor, Tensor]:
    """Run the teacher on pairs drawn from the datasets. Also returns the (past, present, future) frames
    [M, V, 3, 3, H, W] and the latents [M, V, S, D] of the detailed pairs.
    """
    drawn = draw_rows(datasets, config)
    total = sum(map(len, drawn))
    is_detailed = torch.zeros(total, dtype=torch.bool)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(config.seed))
    is_detailed[order[: config.detailed_pairs]] = True
    columns = collections.defaultdict(list)
    detailed = collections.defaultdict(list)
    control = random_teacher(teacher.laq, config.seed)
    seen = first_episode = 0
    for dataset, rows in zip(datasets, drawn):
        for block, frames, has in teacher_frames(teacher, dataset, rows, config.data.num_workers):
            count, pairs = len(frames), frames[:, :, 1:].flatten(0, 1)
            codes = teacher.laq.encode(pairs)
            latents = teacher.choose(codes).unflatten(0, (count, -1))
            new = {
                "episodes": torch.full((len(block),), first_episode + dataset.episode_of(block[0])),
                "indices": codes.indices.reshape(count, -1),
                "latents": latents.flatten(1),
                "random_latents": control.encode(pairs).continuous.reshape(count, -1),
                "change": label_health.cell_change(*pairs.unbind(1)).view(count, -1).amax(1),
                "shift": label_health.image_shift(*pairs.cpu().unbind(1)).unflatten(0, (count, -1)),
            }
            some = is_detailed[seen : seen + len(block)]
            kept = {"triples": frames, "latents": latents, "has_past": has[:, 0]}
            for into, values in ((columns, new), (detailed, {n: v.cpu()[some] for n, v in kept.items()})):
                for name, value in values.items():
                    into[name].append(value.cpu())
            seen += len(block)
        first_episode += len(dataset.episode_from)
    details = {name: torch.cat(values) for name, values in detailed.items()}
    found = {name: torch.cat(values) for name, values in columns.items()} | observe_details(teacher, **details)
    found["targets"] = find_targets(datasets, drawn, config)
    return label_health.Observations(**found), details["triples"], details["latents"]


@torch.no_grad()
def observe_details(
    teacher: OnlineLabels, triples: Tensor, latents: Tensor, has_past: Tensor
) -> dict[str, Tensor]:  # [M, V, 3, 3, H, W], [M, V, S, D], [M]
    """The costlier measurements: still pairs, (past -> now) and (future -> now) if there is a past, reconstruction."""
    laq = teacher.laq
    device = laq.vq.codebooks.device
    columns = collections.defaultdict(list)
    # Another pair's latent is that of the next pair in a random order: that of the next frame would be much alike.
    order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(0))
    others = torch.empty_like(latents)
    others[order] = latents[order.roll(1)]
    for frames, own, other, has in zip(*(values.split(64) for values in (triples, latents, others, has_past))):
        count, frames = len(frames), frames.to(device).flatten(0, 1)
        past, now, future = frames.unbind(1)
        pairs = {"still_latents": (now, now), "past_to_now": (past, now), "future_to_now": (future, now)}
        new = {
            name: teacher.choose(laq.encode(torch.stack(pair, dim=1))).reshape(count, -1)
            for name, pair in pairs.items()
        } | {
            name: pixel_error(laq.reconstruct(frames[:, 1:], latents.to(device).flatten(0, 1)), future)
            for name, latents in {"own_error": own, "other_error": other}.items()
        }
        for name, values in new.items():
            columns[name].append(values.cpu()[has] if name.endswith("_to_now") else values.cpu())
    return {name: torch.cat(values) for name, values in columns.items()}


@torch.no_grad()
def draw_transfer(path: Path, laq: LAQ, triples: Tensor, latents: Tensor) -> None:
    """Latent transfer, of frames [M, V, 3, 3, H, W] and latents [M, V, S, D]: decode six first frames with the pair's
    own latent and with another pair's.

    The pairs are from the tenth with the most motion. Beside each image stands its difference to the first frame.
    """
    device, triples, latents = laq.vq.codebooks.device, triples.flatten(0, 1), latents.flatten(0, 1)
    motion = pixel_error(triples[:, 2], triples[:, 1])
    liveliest = motion.argsort(descending=True)[:: max(1, len(motion) // 60)][:6]
    pairs, own = triples[liveliest, 1:].to(device), latents[liveliest].to(device)
    first, second = pairs.unbind(1)
    columns = {"t": first}
    for title, frames in {
        "t + gap": second,
        "from its latent": laq.reconstruct(pairs, own),
        "from the row above's": laq.reconstruct(pairs, own.roll(1, 0)),
    }.items():
        columns |= {title: frames, f"- t, x 4 ({title})": 0.5 + 4 * (frames - first)}
    label_pictures.draw_transfer(path, {title: images.cpu() for title, images in columns.items()})


def check(config: CheckConfig, datasets: list[data.RobotDataset]) -> None:
    paths.check_new(config.out, "--out")
    laq = load_laq(config.laq_ckpt, config.laq_code_seq_len, config.laq_image_size)
    options = teachers_pairs(config.laq_ckpt, config.data, config.accept_other_pairs)
    data.set_frame_gap(datasets, options.gap_s)
    data_values.refuse_vectors(datasets, data.STATE_KEY, data.ACTION_KEY, data.EXECUTED_ACTION_KEY)
    _, cameras = data_views.choose_cameras(datasets, options)
    all_frames = [(index, dataset.rows()) for index, dataset in enumerate(datasets)]
    valid_share = data.valid_pair_share(datasets, all_frames)
    paired = group_rows(data.with_pairs(datasets, all_frames))
    print(data_table.data_table(datasets, paired, label_cameras=cameras))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    use_tf32(device)
    teacher = OnlineLabels(laq.to(device), config.teacher_kind, cameras)

    seen, triples, latents = observe(teacher, datasets, config)
    found = label_health.measure(seen, laq.config.codebook_size) | {"invalid_share": 1 - valid_share}
    failures, warnings = label_health.judge(found, config.teacher_kind)
    verdict = label_health.Verdict(
        verdict="fail" if failures else "pass",
        reasons=tuple(failures),
        teacher_id=teacher.teacher_id,
        teacher_kind=teacher.kind,
        cameras=cameras,
        teacher_grounding=teachers_grounding(config.laq_ckpt),
        **data_views.gaps(datasets),
    )

    with new_directory(config.out) as out:
        label_pictures.draw_usage(out / "codes.png", found["codes"]["counts"])
        draw_transfer(out / "transfer.png", laq, triples, latents)
        if found["probe"]:
            label_pictures.draw_probe(out / "probe.png", found["probe"])
        label_health.write_report(out / "label_health.json", verdict, found, warnings)
    print(label_health.summary(found, verdict, warnings))
    print(f"report and pictures: {config.out}")
    raise SystemExit(int(verdict.verdict == "fail"))
