"""The options of the teacher's commands: train, with grounding or without, label, and check."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from smolvla_shared import paths, ranges
from smolvla_shared.config import DataConfig, OptimConfig, RunConfig, TeacherOptions
from smolvla_shared.laq_config import LAQConfig

ActionMode = Literal["sum", "change"]
# The shape of a fresh teacher. Every patch shows its change, so no temporal layers are needed.
FRESH = LAQConfig(
    dim=64,
    quant_dim=16,
    image_size=64,
    patch_size=8,
    spatial_depth=1,
    temporal_depth=0,
    dim_head=16,
    heads=4,
    predicts_change=True,
    moves_pixels=True,
    sees_change=True,
)


@dataclass(frozen=True)
class TeacherOptim(OptimConfig):
    # Peak learning rate of AdamW. Default: 3e-3 * 64 / --laq.dim, which is about 2e-4 at LAPA's width of 1024.
    lr: ranges.Rate | None = None
    # Steps of linear warm-up from 0. Default: 50, or a tenth of the run if that is less.
    warmup_steps: ranges.CountOrNone | None = None
    most_warmup_steps: ClassVar[int] = 50

    def of_width(self, dim: int) -> "TeacherOptim":
        """These options, with the default learning rate if none is stated."""
        return self if self.lr else replace(self, lr=3e-3 * 64 / dim)


@dataclass(frozen=True)
class GroundingConfig:
    """A few labelled episodes that the teacher learns from beside its video. Without datasets there is no grounding."""

    # Hub ids of labelled LeRobotDatasets (v3). The column executed_action is used or, if there is none, action.
    repo_ids: tuple[paths.HubDataset, ...] = ()
    # Local directories of labelled LeRobotDatasets (v3).
    roots: tuple[paths.Dataset, ...] = ()
    # Use the first this many episodes of each dataset; 0: all. Episodes that --val-fraction holds out are not used.
    episodes: ranges.CountOrNone = 0
    # Weight of the standardised actions' squared error in the loss. The reconstruction has weight 1.
    weight: ranges.Positive = 0.1
    # Share of labelled pairs in a batch.
    share: ranges.ShareOfSome = 0.25

    def __post_init__(self):
        ranges.check(self, "--grounding.")
        is_there, unused = bool(self.repo_ids or self.roots), "episodes weight share"
        ranges.refuse_without(self, is_there, "--grounding.repo-ids or --grounding.roots", unused, "--grounding.")

    def data_options(self, data: DataConfig) -> DataConfig | None:
        """The video's data options, but with the labelled datasets; None if there are none."""
        named = {"repo_ids": self.repo_ids, "roots": self.roots, "mixture": None, "weights": ()}
        return replace(data, **named) if self.repo_ids or self.roots else None


@dataclass(frozen=True)
class GroundedIn:
    """What a teacher was grounded in. It travels with the teacher's id, so that results can name it."""

    datasets: tuple[str, ...]
    # Of all these datasets together.
    episodes: ranges.Count
    # GroundingConfig.weight
    weight: ranges.Positive

    def __str__(self) -> str:
        return f"{self.episodes} episodes of {', '.join(self.datasets)}, weight {self.weight:g}"


def in_words(teacher_id: str, grounding: GroundedIn | None) -> str:
    """A teacher for a message: the beginning of its id, and what it was grounded in, if in anything."""
    return f"teacher {teacher_id[:12]}" + (f" (grounded in {grounding})" if grounding else "")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(RunConfig):
    """Train a LAQ teacher on video, without actions: codes for what happened between two frames."""

    # Shape of a fresh teacher. The defaults suit hours of video and a CPU or a small GPU.
    laq: LAQConfig = FRESH
    # A LAQ to fine-tune, ours or LAPA's, instead of fresh weights: the stable way if video is scarce. Its shape is in
    # the file, except a LAPA file's --laq.code-seq-len and --laq.image-size.
    init_from: paths.Teacher | None = None
    # AdamW with linear warm-up and a cosine schedule.
    optim: TeacherOptim = field(default_factory=TeacherOptim)
    # A few labelled episodes to learn from beside the video.
    grounding: GroundingConfig = field(default_factory=GroundingConfig)
    # Steps between replacements of dead codes.
    replace_every: ranges.Count = 20
    # A code is dead if it was used less than this share of the average code.
    dead_below: ranges.Share = 0.1
    # No replacements in this last share of the run, so that the codes settle.
    settle_share: ranges.Share = 0.2
    # Warn if a slot effectively uses fewer codes than this, mean over slots, three times in a row.
    collapse_below: ranges.NotNegative = 1.5


@dataclass(frozen=True, kw_only=True)
class LabelConfig(TeacherOptions):
    """Write the latent actions of every frame into a cache, for --labels cache of the training scripts. If the command
    is killed, run it again: it goes on where it stopped."""

    # The teacher: a .safetensors file of `teacher train`, or LAPA's .pt file.
    laq_ckpt: paths.Teacher
    # Directory of the label cache. Each dataset gets a subdirectory.
    label_cache: paths.Directory
    # Which recordings, and which pairs of their frames.
    data: DataConfig
    # Pairs in a forward pass of the teacher.
    batch_size: ranges.Count = 64

    def __post_init__(self):
        ranges.check(self, "--")


@dataclass(frozen=True, kw_only=True)
class CheckConfig(TeacherOptions):
    """Measure whether a teacher's latent actions are worth learning. Writes label_health.json and pictures, prints a
    verdict with reasons, and exits with code 1 if the labels fail."""

    # The teacher: a .safetensors file of `teacher train`, or LAPA's .pt file.
    laq_ckpt: paths.Teacher
    # New directory for the report and its pictures.
    out: paths.NewDirectory
    # Datasets to measure on. With actions or a state, a probe measures how much of the motion is in the latents.
    data: DataConfig
    # Frame pairs to measure, drawn from all datasets.
    pairs: ranges.Pairs = 5000
    # How many of these also get the costlier measurements: still pairs, past and future, reconstruction.
    detailed_pairs: ranges.Pairs = 500
    # sum: actions are velocities or deltas, added up over the gap. change: actions are absolute positions. Default:
    # decided from the data, and printed.
    actions: ActionMode | None = None
    # Seed of the drawn pairs and of the random teacher's weights.
    seed: ranges.Seed = 0

    def __post_init__(self):
        ranges.check(self, "--")
