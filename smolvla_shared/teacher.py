"""The LAQ teacher's commands: train one, write its labels into a cache, check whether its labels are any good.

accelerate launch -m smolvla_shared.teacher train --data.roots my/videos --run-dir runs/laq
accelerate launch -m smolvla_shared.teacher label --laq-ckpt laq.safetensors --data.roots my/videos --label-cache labels
python -m smolvla_shared.teacher check --laq-ckpt laq.safetensors --data.roots my/videos --out runs/check
"""

import collections
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from smolvla_shared import data, health
from smolvla_shared.batch import RawBatch, to_device
from smolvla_shared.cache import RowCache, dataset_fingerprint
from smolvla_shared.config import LATENT, RunConfig, SourceConfig, StageConfig, TeacherKind, TeacherOptions
from smolvla_shared.labels import (
    CachedLabels,
    LabelKey,
    Labels,
    cached_teacher_id,
    label_directories,
    label_store,
)
from smolvla_shared.laq import (
    LAQ,
    LAQConfig,
    LatentActions,
    PairBatch,
    load_laq,
    perplexity,
    replace_dead_codes,
    save_laq,
    teacher_id,
)
from smolvla_shared.preprocess import Statistics, unit_range

TEACHER_FILE = "laq.safetensors"
NOISE = "nsvq"  # the key of the quantiser's noise in a RawBatch


# --- labels -----------------------------------------------------------------------------------------------------------


class OnlineLabels:
    """labels.Labels from the teacher itself, on the device that it is on."""

    def __init__(self, laq: LAQ, kind: TeacherKind, camera: str):
        self.laq, self.kind, self.camera = laq, kind, camera
        self.teacher_id = teacher_id(laq)
        self.shape = laq.config.code_seq_len, laq.config.quant_dim
        self.pair_size = laq.config.image_size

    def to(self, device: torch.device) -> None:
        self.laq.to(device)

    def choose(self, latents: LatentActions) -> Tensor:  # [B, S, D]
        """Those of its latents that are the labels."""
        return latents.continuous if self.kind == "continuous" else latents.vectors

    @torch.no_grad()
    def __call__(self, raw: RawBatch) -> Tensor:  # [B, S, D]
        return self.choose(self.laq.encode(unit_range(raw.pairs)))


def open_labels(config: StageConfig, sources: list[data.Source], camera: str) -> Labels:
    """The latent targets that the options name; an online teacher is on the CPU still.

    Raises ValueError for a teacher that cannot be loaded, and for a cache that is not complete or whose key differs.
    """
    laq = load_laq(config.laq_ckpt, config.laq_code_seq_len, config.laq_image_size) if config.laq_ckpt else None
    if config.labels == "online":
        assert laq is not None  # both scripts' options see to it
        return OnlineLabels(laq, config.teacher_kind, camera)
    directories = label_directories(config.label_cache, [source.name for source in sources])
    teacher = teacher_id(laq) if laq else cached_teacher_id(directories[0])
    keys = [label_key(source, teacher, config.teacher_kind, camera) for source in sources]
    return CachedLabels([label_store(*x) for x in zip(directories, keys, [s.num_frames for s in sources])])


def label_key(source: data.Source, teacher: str, kind: TeacherKind, camera: str) -> LabelKey:
    return LabelKey(
        teacher_id=teacher,
        teacher_kind=kind,
        frame_gap_s=source.gap_s,
        camera=camera,
        dataset=dataset_fingerprint(source.dataset.root),
        versions={name: metadata.version(name) for name in ("torch", "lerobot", data.video_decoder())},
    )


def latent_statistics(
    labels: Labels,
    sources: list[data.Source],
    frames: list[tuple[int, np.ndarray]],
    seed: int,
    device: torch.device | str = "cpu",
) -> Statistics:
    """Mean and standard deviation of the latent targets over up to 512 valid training pairs, drawn with the seed."""
    spec = data.SampleSpec(
        cameras=(), label_camera=labels.camera, pair_size=labels.pair_size, draws={LATENT: labels.shape}
    )
    sampler = data.StepSampler(data.group_frames(frames), seed, batch_size=32, first_step=0, last_step=16)
    loader = data.make_loader(data.SampleDataset(sources, spec, seed), sampler, num_workers=0)
    vectors = [labels(to_device(raw, device)).flatten(1).cpu()[raw.pair_mask] for raw in loader]
    statistics = Statistics.of(torch.cat(vectors))
    if max(statistics.std) == 0:
        raise ValueError(
            "the teacher gives every pair the same latent action: its codebook has collapsed, or the pairs do not "
            "move (try a larger --data.frame-gap-s, or train the teacher longer)"
        )
    # A dimension that never changes carries nothing; a floor keeps rounding from being blown up to a target.
    floor = 1e-3 * max(statistics.std)
    return Statistics(statistics.mean, tuple(max(std, floor) for std in statistics.std))


@dataclass(frozen=True, kw_only=True)
class LabelConfig(TeacherOptions):
    """Write the latent actions of every frame of the datasets into a cache, for --labels cache of the scripts. A
    command that was killed goes on where it stopped when it is run again."""

    # The teacher: a .safetensors file of `teacher train`, or LAPA's .pt file.
    laq_ckpt: Path
    # Directory of the label cache; each dataset gets one of its own in it.
    label_cache: Path
    # Which recordings, and which pairs of their frames.
    data: SourceConfig
    # Pairs that the teacher sees at once.
    batch_size: int = 64


def label(config: LabelConfig) -> None:
    accelerator = Accelerator()
    laq = load_laq(config.laq_ckpt, config.laq_code_seq_len, config.laq_image_size)
    sources = data.open_sources(config.data)
    _, camera = data.choose_cameras(sources, config.data)
    data.valid_pair_share(sources, [(i, np.arange(source.num_frames)) for i, source in enumerate(sources)])
    directories = label_directories(config.label_cache, [source.name for source in sources])
    stores = [
        label_store(directory, label_key(source, teacher_id(laq), config.teacher_kind, camera), source.num_frames)
        for directory, source in zip(directories, sources)
    ]
    unfinished = [not store.is_complete() for store in stores]  # all keys are compared before any work
    laq.to(accelerator.device)
    for source, store, todo in zip(sources, stores, unfinished):
        if todo:
            label_dataset(laq, source, camera, store, config, accelerator)
        accelerator.print(f"{store.directory}: {source.num_frames:,} frames {'labelled' if todo else 'were labelled'}")


@torch.no_grad()
def label_dataset(
    laq: LAQ, source: data.Source, camera: str, store: RowCache, config: LabelConfig, accelerator: Accelerator
) -> None:
    """Fill the label cache of a dataset; every process does its share of the shards."""
    slots, width = laq.config.code_seq_len, laq.config.quant_dim

    def empty(num_rows: int) -> dict[str, np.ndarray]:
        arrays = {
            "indices": np.zeros((num_rows, slots), np.min_scalar_type(laq.config.codebook_size - 1)),
            "mask": np.zeros(num_rows, bool),
        }
        if config.teacher_kind == "continuous":
            arrays["continuous"] = np.zeros((num_rows, slots, width), np.float32)
        return arrays

    def compute(frames: Tensor, places: Tensor) -> dict[str, np.ndarray]:
        latents = laq.encode(laq.resize(unit_range(frames))[places])
        arrays = {"indices": latents.indices.numpy(force=True), "mask": np.ones(len(places), bool)}
        if config.teacher_kind == "continuous":
            arrays["continuous"] = latents.continuous.numpy(force=True)
        return arrays

    if accelerator.is_main_process:
        store.claim()
        np.save(store.directory / "codebook.npy", laq.vq.codebooks.numpy(force=True))
    data.fill_cache(
        store,
        source,
        camera,
        offsets=(0, source.gap),
        blocks_of=lambda rows: data.episode_blocks(source, source.rows_with_pairs(np.array(rows)), config.batch_size),
        empty=empty,
        compute=compute,
        num_workers=config.data.num_workers,
        accelerator=accelerator,
    )


# --- health -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CheckConfig(TeacherOptions):
    """Measure whether a teacher's latent actions are worth learning: writes label_health.json and pictures, prints a
    verdict with reasons, and exits with code 1 if it fails."""

    # The teacher: a .safetensors file of `teacher train`, or LAPA's .pt file.
    laq_ckpt: Path
    # New directory for the report and its pictures.
    out: Path
    # Recordings to measure on. Where they have actions, probes tell how much of them is in the latents.
    data: SourceConfig
    # Frame pairs to look at, drawn from all datasets.
    pairs: int = 5000
    # Pairs of them that get the costlier measurements: still pairs, past and future, reconstruction.
    detailed_pairs: int = 500
    # Frame gaps, in seconds, to compare by the probe.
    gaps: tuple[float, ...] = ()
    # How the actions of a gap add up: their `sum` (velocities, deltas) or their `change` (absolute positions).
    actions: Literal["sum", "change"] = "sum"
    # Which pairs are drawn, and the random teacher's weights.
    seed: int = 0

    def __post_init__(self):
        if min(self.pairs, self.detailed_pairs) < 2:
            raise ValueError(
                f"--pairs and --detailed-pairs must be at least 2, got {self.pairs} and {self.detailed_pairs}"
            )


@torch.no_grad()
def random_teacher(laq: LAQ, frames: Tensor, seed: int) -> LAQ:  # [B, 2, 3, H, W]
    """A teacher of the same shape with random weights. Its codes are latents of `frames`: a codebook that never meets
    its latents would make all pairs alike, and too easy a control.
    """
    torch.manual_seed(seed)
    with frames.device:
        control = LAQ(laq.config).requires_grad_(False).eval()
    latents = control.encode(frames).continuous.flatten(0, 1)
    control.vq.codebooks[:] = latents[torch.randint(len(latents), (laq.config.codebook_size,))]
    return control


def summed_actions(source: data.Source, rows: np.ndarray, mode: str, dim: int) -> Tensor:  # [n, A]
    """What the actions did between the frames of each pair; NaN where the dataset has none."""
    if data.ACTION_KEY not in source.features:
        return torch.full((len(rows), dim), float("nan"))
    actions = torch.from_numpy(np.asarray(source.vectors[:][data.ACTION_KEY], np.float64)).view(-1, dim)
    if mode == "change":
        return actions[rows + source.gap] - actions[rows]
    total = F.pad(actions.cumsum(0), (0, 0, 1, 0))
    return total[rows + source.gap] - total[rows]


def draw_rows(sources: list[data.Source], config: CheckConfig) -> list[np.ndarray]:
    """Rows with pairs, drawn from each source in proportion to what it has; sorted."""
    rng = np.random.default_rng(config.seed)
    valid = [source.rows_with_pairs(np.arange(source.num_frames)) for source in sources]
    share = min(1.0, config.pairs / sum(map(len, valid)))
    return [np.sort(rng.choice(rows, round(share * len(rows)), replace=False)) for rows in valid]


def teacher_frames(
    teacher: OnlineLabels, source: data.Source, rows: np.ndarray, gaps: tuple[int, ...], num_workers: int
) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """Blocks of rows, the frames that lie `gaps` gaps from each [n, gaps, 3, H, W] as the teacher sees them, and
    whether the episode has them [n, gaps].
    """
    blocks = data.episode_blocks(source, rows, size=64)
    frames = data.FrameBlocks(source, teacher.camera, blocks, tuple(gap * source.gap for gap in gaps))
    device = teacher.laq.vq.codebooks.device
    progress = tqdm(total=len(rows), desc=f"{Path(source.name).name}, gap {source.gap_s:.3g} s", unit="pair")
    for block, (pictures, places, has) in zip(blocks, data.block_loader(frames, num_workers)):
        yield block, teacher.laq.resize(unit_range(pictures.to(device)))[places.to(device)], has
        progress.update(len(block))
    progress.close()


@torch.no_grad()
def observe(
    teacher: OnlineLabels, sources: list[data.Source], config: CheckConfig
) -> tuple[health.Observations, Tensor, Tensor]:
    """What health.py judges, of pairs drawn from the sources; and (past, present, future) frames [M, 3, 3, H, W] of the
    detailed ones with their latents [M, S, D].
    """
    drawn = draw_rows(sources, config)
    total = sum(map(len, drawn))
    is_detailed = torch.zeros(total, dtype=torch.bool)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(config.seed))
    is_detailed[order[: config.detailed_pairs]] = True
    dim = data.common_dim(sources, data.ACTION_KEY)
    columns = collections.defaultdict(list)
    detailed = collections.defaultdict(list)
    control = None
    seen = first_episode = 0
    for source, rows in zip(sources, drawn):
        columns["actions"].append(summed_actions(source, rows, config.actions, dim))
        for block, frames, has in teacher_frames(teacher, source, rows, (-1, 0, 1), config.data.num_workers):
            pairs = frames[:, 1:]
            if control is None:
                control = OnlineLabels(random_teacher(teacher.laq, pairs, config.seed), teacher.kind, teacher.camera)
            codes = teacher.laq.encode(pairs)
            latents = teacher.choose(codes)
            new = {
                "episodes": torch.full((len(block),), first_episode + source.episode_of(block[0])),
                "indices": codes.indices,
                "latents": latents.flatten(1),
                "random_latents": control.choose(control.laq.encode(pairs)).flatten(1),
                "change": health.cell_change(*pairs.unbind(1)).amax(1),
                "shift": health.image_shift(*pairs.cpu().unbind(1)),
            }
            some = is_detailed[seen : seen + len(block)]
            kept = {"triples": frames, "latents": latents, "has_past": has[:, 0]}
            for into, values in ((columns, new), (detailed, {n: v.cpu()[some] for n, v in kept.items()})):
                for name, value in values.items():
                    into[name].append(value.cpu())
            seen += len(block)
        first_episode += len(source.episode_from)
    details = {name: torch.cat(values) for name, values in detailed.items()}
    found = {name: torch.cat(values) for name, values in columns.items()} | observe_details(teacher, **details)
    return health.Observations(**found), details["triples"], details["latents"]


@torch.no_grad()
def probe_at(teacher: OnlineLabels, sources: list[data.Source], config: CheckConfig) -> list[float | None] | None:
    """health.probe at the frame gap of these sources, which have actions."""
    dim, columns, first_episode = data.common_dim(sources, data.ACTION_KEY), collections.defaultdict(list), 0
    for source, rows in zip(sources, draw_rows(sources, config)):
        columns["actions"].append(summed_actions(source, rows, config.actions, dim))
        for block, pairs, _ in teacher_frames(teacher, source, rows, (0, 1), config.data.num_workers):
            columns["latents"].append(teacher.choose(teacher.laq.encode(pairs)).flatten(1).cpu())
            columns["episodes"].append(torch.full((len(block),), first_episode + source.episode_of(block[0])))
        first_episode += len(source.episode_from)
    return health.probe(**{name: torch.cat(values) for name, values in columns.items()})


@torch.no_grad()
def observe_details(
    teacher: OnlineLabels, triples: Tensor, latents: Tensor, has_past: Tensor
) -> dict[str, Tensor]:  # [M, 3, 3, H, W], [M, S, D], [M]
    """The costlier measurements: still pairs, the present from either side (where it has a past), reconstruction."""
    laq = teacher.laq
    device = laq.vq.codebooks.device
    columns = collections.defaultdict(list)
    # Another pair's latent: the next of a random order, so that it is not that of the frame after.
    order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(0))
    others = torch.empty_like(latents)
    others[order] = latents[order.roll(1)]
    for frames, own, other, has in zip(*(values.split(64) for values in (triples, latents, others, has_past))):
        frames = frames.to(device)
        past, now, future = frames.unbind(1)
        still = laq.encode(torch.stack([now, now], dim=1))
        new = {
            "still_indices": still.indices,
            "still_latents": teacher.choose(still).flatten(1),
            "past_to_now": teacher.choose(laq.encode(torch.stack([past, now], dim=1))).flatten(1),
            "future_to_now": teacher.choose(laq.encode(torch.stack([future, now], dim=1))).flatten(1),
            "own_error": (laq.reconstruct(frames[:, 1:], own.to(device)) - future).square().mean((1, 2, 3)),
            "other_error": (laq.reconstruct(frames[:, 1:], other.to(device)) - future).square().mean((1, 2, 3)),
            "copy_error": (now - future).square().mean((1, 2, 3)),
        }
        for name, values in new.items():
            columns[name].append(values.cpu()[has] if name.endswith("_to_now") else values.cpu())
    return {name: torch.cat(values) for name, values in columns.items()}


@torch.no_grad()
def draw_transfer(path: Path, laq: LAQ, triples: Tensor, latents: Tensor) -> None:
    """The latent transfer test on six pairs: what the decoder makes of a frame with another pair's latent."""
    device = laq.vq.codebooks.device
    rows = torch.linspace(0, len(triples) - 1, 6).round().long()
    pairs, own = triples[rows, 1:].to(device), latents[rows].to(device)
    from_own, from_other = laq.reconstruct(pairs, own), laq.reconstruct(pairs, own.roll(1, 0))
    columns = {
        "t": pairs[:, 0],
        "t + gap": pairs[:, 1],
        "from its latent": from_own,
        "from the row above's": from_other,
        "their difference x 4": 0.5 + 4 * (from_own - from_other),
    }
    health.draw_transfer(path, {title: images.cpu() for title, images in columns.items()})


def sources_with_actions(config: SourceConfig) -> list[data.Source]:
    """The datasets that a probe can use, with the pairs of this frame gap. Raises ValueError if there are none."""
    sources = [source for source in data.open_sources(config) if data.ACTION_KEY in source.features]
    if not sources:
        raise ValueError("--gaps compares frame gaps by the probe, but none of the datasets has actions: leave it out")
    data.valid_pair_share(sources, [(i, np.arange(source.num_frames)) for i, source in enumerate(sources)])
    return sources


def check(config: CheckConfig) -> None:
    if config.out.exists():
        raise ValueError(f"--out {config.out} exists: name a new directory")
    laq = load_laq(config.laq_ckpt, config.laq_code_seq_len, config.laq_image_size)
    sources = data.open_sources(config.data)
    _, camera = data.choose_cameras(sources, config.data)
    all_frames = [(index, np.arange(source.num_frames)) for index, source in enumerate(sources)]
    valid_share = data.valid_pair_share(sources, all_frames)
    by_gap = {gap: sources_with_actions(replace(config.data, frame_gap_s=gap)) for gap in sorted(config.gaps)}
    print(data.describe(sources, with_pairs=True))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = OnlineLabels(laq.to(device), config.teacher_kind, camera)

    seen, triples, latents = observe(teacher, sources, config)
    found = health.measure(seen, laq.config.codebook_size) | {"invalid_share": 1 - valid_share}
    sweep = {gap: probe_at(teacher, others, config) for gap, others in by_gap.items()}
    found["probe_by_gap"] = sweep
    failures, warnings = health.judge(found, config.teacher_kind)
    verdict = health.Verdict(
        verdict="fail" if failures else "pass",
        reasons=tuple(failures),
        teacher_id=teacher.teacher_id,
        teacher_kind=teacher.kind,
        frame_gap_s=config.data.frame_gap_s,
        camera=camera,
    )

    config.out.mkdir(parents=True)
    health.draw_usage(config.out / "codes.png", found["codes"]["counts"])
    draw_transfer(config.out / "transfer.png", laq, triples, latents)
    if found["probe"]["latents"]:
        health.draw_probe(config.out / "probe.png", found["probe"], sweep)
    health.write_report(config.out / "label_health.json", verdict, found, warnings)
    print(health.summary(found, verdict, warnings))
    print(f"report and pictures: {config.out}")
    raise SystemExit(int(verdict.verdict == "fail"))


def accepted_health(path: Path | None, accept: bool, labels: Labels, data_config: SourceConfig, camera: str) -> dict:
    """The fields of artifact.Latents about label health. Raises ValueError for a report on other labels, or a failed
    verdict that was not accepted.
    """
    if path is None:
        return {}
    verdict = health.read_verdict(path)
    rows = [
        f"  {what}: this run {here}, {path.name} {there}"
        for what, here, there in (
            ("teacher", labels.teacher_id, verdict.teacher_id),
            ("--teacher-kind", labels.kind, verdict.teacher_kind),
            ("--data.frame-gap-s", data_config.frame_gap_s, verdict.frame_gap_s),
            ("label camera", camera, verdict.camera),
        )
        if here != there
    ]
    if rows:
        raise ValueError("--label-health is about other labels, check these:\n" + "\n".join(rows))
    if verdict.verdict == "fail" and not accept:
        raise ValueError(
            f"{path}: these labels failed the check:\n  " + "\n  ".join(verdict.reasons) + "\nStage 2 would learn "
            "them well, and its own losses would not show that they are worth nothing: a constant, the camera or the "
            "scene instead of the motion. Stage 3 would then gain nothing over its scratch arm. Mend the teacher, or "
            "pass --accept-label-health for a control arm"
        )
    return {"health": verdict.verdict, "health_reasons": verdict.reasons}


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(RunConfig):
    """Train a LAQ teacher on video: it learns codes that tell a frame from an earlier one. Needs no actions."""

    # The defaults are the shape of LAPA's released teacher.
    laq: LAQConfig = field(default_factory=LAQConfig)
    # A LAQ to fine-tune, ours or LAPA's, instead of fresh weights: the stable way where video is scarce. It brings its
    # shape; of a LAPA file only --laq.code-seq-len and --laq.image-size are not in it.
    init_from: Path | None = None
    # Steps between replacements of dead codes; their uses are counted over all processes.
    replace_every: int = 100
    # A code is dead when it was used less than this share of the average.
    dead_below: float = 0.05
    # No replacement in the last share of the run, so that the codes settle.
    settle_share: float = 0.2
    # Warn when the slots effectively use fewer codes than this on average, three times in a row.
    collapse_below: float = 1.5


def start_laq(config: TeacherConfig) -> LAQ:
    """A fresh LAQ, or the one to fine-tune. Raises ValueError where --laq.* contradicts its shape."""
    if config.init_from is None:
        return LAQ(config.laq)
    default = asdict(LAQConfig())
    stated = {name: value for name, value in asdict(config.laq).items() if value != default[name]}
    given = load_laq(config.init_from, stated.get("code_seq_len"), stated.get("image_size"))
    shape = asdict(given.config)
    rows = [
        f"  {name}: command line {value}, file {shape[name]}" for name, value in stated.items() if value != shape[name]
    ]
    if rows:
        raise ValueError(f"--init-from {config.init_from} brings its own shape, leave these out:\n" + "\n".join(rows))
    laq = LAQ(given.config)
    laq.load_state_dict(given.state_dict())
    return laq


def train_teacher(config: TeacherConfig) -> None:
    from smolvla_shared.checkpoint import check_run
    from smolvla_shared.training import make_accelerator, origin, train

    accelerator = make_accelerator(config)
    if accelerator.is_fsdp2:
        raise ValueError("a teacher fits every GPU and is not divided: use configs/accelerate/ddp_8gpu.yaml")
    sources = data.open_sources(config.data)
    _, label_camera = data.choose_cameras(sources, config.data)
    frames, held_out_frames = data.split_sources(sources, config.data, config.seed)
    pair_share = data.valid_pair_share(sources, frames)
    resume_from = check_run(config, accelerator)
    laq = start_laq(config)
    accelerator.print(data.describe(sources, with_pairs=True))
    accelerator.print(
        f"LAQ {f'from {config.init_from}' if config.init_from else 'with fresh weights'}: "
        f"{sum(p.numel() for p in laq.parameters()):,} parameters; a latent action is {laq.config.code_seq_len} codes "
        f"out of {laq.config.codebook_size}; {data.plan(data.group_frames(frames), config)}; pairs of {label_camera}, "
        f"{pair_share:.1%} of the frames have one"
    )

    spec = data.SampleSpec(
        cameras=(),
        label_camera=label_camera,
        pair_size=laq.config.image_size,
        draws={NOISE: (laq.config.code_seq_len, laq.config.quant_dim)},
    )
    loaders = data.make_loaders(
        sources, data.group_frames(frames), data.group_frames(held_out_frames), spec, config, accelerator
    )

    def prepare(raw: RawBatch) -> PairBatch:
        return PairBatch(raw.pairs, raw.pair_mask, raw.noise[NOISE][:, 0])

    collapsed = 0  # reports in a row

    def replace_and_report(step: int) -> dict[str, float]:
        nonlocal collapsed
        if step % config.replace_every:
            return {}
        usage = laq.vq._usage.clone()
        laq.vq._usage.zero_()
        replaced = 0
        if step <= (1 - config.settle_share) * config.steps:
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            replaced = replace_dead_codes(laq, usage, config.dead_below, generator)
        per_slot = perplexity(usage.float())
        collapsed = collapsed + 1 if per_slot.mean() < config.collapse_below else 0
        if collapsed == 3 and accelerator.is_main_process:
            tqdm.write(
                f"warning: at step {step} a slot effectively uses {per_slot.mean():.2f} codes of "
                f"{laq.config.codebook_size}: the codebook has collapsed. If it does not recover, fine-tune a healthy "
                "teacher (--init-from), lower --optim.lr, or replace dead codes more often (--replace-every)"
            )
        return {
            "usage/perplexity": per_slot.mean().item(),
            "usage/lowest_slot_perplexity": per_slot.min().item(),
            "usage/replaced_codes": replaced,
            **{f"usage/perplexity_of_slot_{slot}": value for slot, value in enumerate(per_slot.tolist())},
        }

    def evaluate() -> dict[str, float]:
        """Error of the reconstruction from the codes, beside that of repeating the first frame."""
        sums = torch.zeros(3, device=accelerator.device)
        for raw in loaders.held_out():
            frames = laq.resize(unit_range(raw.pairs.to(accelerator.device)))
            mask = raw.pair_mask.to(accelerator.device)
            predicted = laq.reconstruct(frames)
            errors = [(p - frames[:, 1]).square().mean((1, 2, 3)) * mask for p in (predicted, frames[:, 0])]
            sums += torch.stack([errors[0].sum(), errors[1].sum(), mask.sum()])
        reconstruction, copy, count = accelerator.reduce(sums, "sum").tolist()
        return {"reconstruction": reconstruction / max(count, 1), "reconstruction_of_first_frame": copy / max(count, 1)}

    def export(directory: Path, weights: dict[str, Tensor], step: int) -> None:
        directory.mkdir(parents=True)
        with torch.device("meta"):
            published = LAQ(laq.config)
        published.load_state_dict(weights, assign=True)
        source = origin(config, step, [s.name for s in sources])
        source |= {"frame_gap_s": config.data.frame_gap_s, "label_camera": label_camera}
        save_laq(published, directory / TEACHER_FILE, extra=source)

    train(
        config,
        accelerator,
        laq,
        loaders.train,
        prepare,
        evaluate=torch.no_grad()(evaluate) if loaders.held_out else None,
        export=export,
        after_step=replace_and_report,
        resume_from=resume_from,
    )
    accelerator.print(f"teacher: {config.run_dir / 'checkpoints' / 'last' / 'pretrained_model' / TEACHER_FILE}")


COMMANDS = {"train": (TeacherConfig, train_teacher), "label": (LabelConfig, label), "check": (CheckConfig, check)}


def main(arguments: list[str]) -> None:
    name = arguments[0] if arguments else "nothing"
    if name not in COMMANDS:
        raise SystemExit(f"python -m smolvla_shared.teacher {{{','.join(COMMANDS)}}} [--help]; got {name}")
    config_class, command = COMMANDS[name]
    command(tyro.cli(config_class, prog=f"python -m smolvla_shared.teacher {name}", args=arguments[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
