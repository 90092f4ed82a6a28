"""Configuration: frozen dataclasses, from the command line (tyro turns the comments into --help) to the manifest.

`CoreConfig` is the one description of a model: `SmolVLASharedCore(CoreConfig(**fields))` rebuilds it, without a hub,
from an artifact's manifest or a policy's config.json. The other classes are the option groups of the scripts.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

# Which of a teacher's latents are the labels: the codebook's rows, or the latent before it is quantised.
TeacherKind = Literal["quantized", "continuous"]
LATENT, ACTION = "latent", "action"  # the names of the two flow-matching targets, wherever they are dictionary keys


@dataclass(frozen=True)
class CoreConfig:
    """Everything that determines the shape and the numbers of a `SmolVLASharedCore`."""

    # Hub id, local directory or preset the trunk's architecture, weights and tokenizer came from.
    model_name: str
    # Hub revision of it; None for a local directory or a preset.
    model_revision: str | None
    # The trunk's full transformers configuration (SmolVLMConfig.to_dict()), so that a rebuild asks no hub.
    vlm: dict[str, Any]
    # Camera keys in the order in which their tokens enter the prefix.
    cameras: tuple[str, ...]
    # Side of the square that every image is padded to, pixels.
    image_size: int
    # Text layers of the trunk that are kept, counted from the first.
    num_trunk_layers: int = 16
    # dtype of the trunk's stored weights; heads and flow matching are float32 in any case.
    torch_dtype: Literal["float32", "bfloat16"] = "float32"
    # Text is padded to the longest of the batch and truncated here, tokens.
    max_text_tokens: int = 48
    # Ids of the tokenizer's (fake image, global image) tokens, where they enclose each camera's tokens; empty: nothing
    # does, as in the released SmolVLA.
    image_special_tokens: tuple[int, ...] = ()
    # Real dimensions of the proprioceptive state (0: there is none) and what they are zero-padded to.
    state_dim: int = 0
    max_state_dim: int = 32
    # Flattened width S * D of a latent action, and its number of tokens S; 0: no latent head.
    latent_vector_dim: int = 0
    code_seq_len: int = 0
    # Real dimensions of an action (0: no action head), what they are zero-padded to, and actions in a chunk.
    action_dim: int = 0
    max_action_dim: int = 32
    chunk_size: int = 50
    # Width of the expert over the trunk's, and every how many layers it attends to itself instead of across.
    expert_width_multiplier: float = 0.75
    self_attn_every_n_layers: int = 2
    # Euler steps of a sample; periods of the sine-cosine time embedding; Beta distribution of training times.
    flow_steps: int = 10
    min_period: float = 4e-3
    max_period: float = 4.0
    time_beta_alpha: float = 1.5
    time_beta_beta: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "cameras", tuple(self.cameras))  # JSON has lists
        object.__setattr__(self, "image_special_tokens", tuple(self.image_special_tokens))
        if self.code_seq_len and self.latent_vector_dim % self.code_seq_len:
            raise ValueError(
                f"latent_vector_dim {self.latent_vector_dim} is not a multiple of code_seq_len {self.code_seq_len}"
            )
        for what, real, padded in [
            ("state", self.state_dim, self.max_state_dim),
            ("action", self.action_dim, self.max_action_dim),
        ]:
            if real > padded:
                raise ValueError(
                    f"the data's {what} has {real} dimensions, the model is built for at most {padded}: "
                    f"raise max_{what}_dim"
                )

    @property
    def has_pretrained_trunk(self) -> bool:
        return self.model_name != TINY

    @property
    def latent_dim(self) -> int:
        """D, the width of one latent token."""
        return self.latent_vector_dim // self.code_seq_len if self.code_seq_len else 0


TINY = "tiny"  # the model_name of the trunk that ships with this package
PRESETS = {"smolvlm2-500m": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct", "tiny": TINY}


@dataclass(frozen=True)
class ModelConfig:
    # The trunk: `smolvlm2-500m` is SmolVLA's, with pretrained weights; `tiny` ships with this package (random weights,
    # for CPUs, tests and the demo). Default: smolvlm2-500m, or that of the artifact or policy that is started from.
    preset: Literal["smolvlm2-500m", "tiny"] | None = None
    # Hub id or local directory of a SmolVLM, instead of a preset's.
    name: str | None = None
    # Hub revision (branch, tag or commit) of it; recorded in the manifest.
    revision: str | None = None
    # A LeRobot SmolVLA policy to start from, instead of a fresh expert on the trunk's weights: a directory or a hub id
    # (lerobot/smolvla_base). Its cameras are taken in order; without --data.cameras they must have the same names.
    init_from: Annotated[str | None, tyro.conf.arg(prefix_name=False)] = None
    # Keep the vision tower and connector as they are. Default: yes if the trunk has pretrained weights.
    freeze_vision: bool | None = None
    # Keep the whole trunk as it is: vision, connector and language layers. Default: as for vision.
    freeze_trunk: bool | None = None
    # Keep the projection of the proprioceptive state as it is.
    freeze_state_projection: bool = False
    # Show the proprioceptive state to the model where the dataset has one.
    use_state: bool = True
    # Recompute each layer's activations in the backward pass instead of keeping them: less memory, more time.
    activation_checkpointing: bool = False
    # Compile each layer (torch.compile); the first steps take minutes. Results change by rounding.
    compile: bool = False

    def __post_init__(self):
        if self.preset and self.name:
            raise ValueError(f"--model.preset {self.preset} and --model.name {self.name} both name a trunk: drop one")

    @property
    def stated_name(self) -> str | None:
        """The trunk that the user asked for, if any."""
        return self.name or (PRESETS[self.preset] if self.preset else None)


@dataclass(frozen=True)
class DataConfig:
    """Which recordings, and which pairs of their frames."""

    # Hub ids of LeRobotDatasets (v3). The local LeRobot cache is looked up first.
    repo_ids: tuple[str, ...] = ()
    # Local directories of LeRobotDatasets (v3), instead of or beside repo_ids.
    roots: tuple[Path, ...] = ()
    # Camera keys to use, in this order. Default: every camera that all datasets have, in their order.
    cameras: tuple[str, ...] = ()
    # Camera whose frame pairs the LAQ teacher sees. Default: the teacher's own, else the first of the cameras.
    label_camera: str | None = None
    # Time between the two frames of a pair, seconds. Default: the teacher's own, else 0.5 (LAPA's files do not say).
    frame_gap_s: float | None = None
    # Loader processes for each training process; 0 loads in the training process itself.
    num_workers: int = 4

    def __post_init__(self):
        if not self.repo_ids and not self.roots:
            raise ValueError("no dataset given: pass --data.repo-ids (hub ids) or --data.roots (local directories)")
        if self.frame_gap_s is not None and self.frame_gap_s <= 0:
            raise ValueError(f"--data.frame-gap-s must be a positive number of seconds, got {self.frame_gap_s}")

    @property
    def gap_s(self) -> float:
        """The frame gap where no teacher has one of its own, seconds."""
        return 0.5 if self.frame_gap_s is None else self.frame_gap_s


@dataclass(frozen=True)
class PolicyDataConfig(DataConfig):
    """Which recordings, and how a policy trains on them."""

    # Shift the policy's images at random by up to this share of their side (training only, never the teacher's pairs).
    random_shift: float = 0.0
    # Directory of the feature cache: the frozen vision tower's output for every frame, computed once before training.
    # Every run with the same tower and data reads it.
    feature_cache: Path | None = None
    # Type of the cached features; bfloat16 takes half the space and rounds them to 8 bits.
    feature_cache_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # Largest size of the feature cache on the disk, GB (10^9 bytes).
    feature_cache_gb: float = 100.0

    def __post_init__(self):
        super().__post_init__()
        if self.feature_cache and self.random_shift:
            raise ValueError(
                "--data.feature-cache keeps features of the frames as recorded, but --data.random-shift "
                f"{self.random_shift} would train on others: drop one of them"
            )


@dataclass(frozen=True)
class OptimConfig:
    # Peak learning rate of AdamW.
    lr: float = 1e-4
    # Steps of linear warm-up from 0.
    warmup_steps: int = 500
    # The cosine schedule ends at this share of the peak.
    final_lr_share: float = 0.025
    # Decay of AdamW's running averages of the gradient and of its square.
    betas: tuple[float, float] = (0.9, 0.95)
    # Weight decay of AdamW.
    weight_decay: float = 1e-10
    # Largest gradient norm; larger ones are scaled down.
    max_grad_norm: float = 10.0

    def __post_init__(self):
        if self.max_grad_norm <= 0:
            raise ValueError(f"--optim.max-grad-norm must be above 0 (inf: no limit), got {self.max_grad_norm}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options that mean the same in every training command."""

    # Directory of the run: config.json, metrics.jsonl, curves.png, checkpoints/. Must be new, unless --resume.
    run_dir: Path
    # Which recordings, and how they are read.
    data: DataConfig
    # Share of each dataset's episodes held out for evaluation; at least one episode when above 0.
    val_fraction: float = 0.05
    # Optimizer steps of the whole run. Raised on --resume, the learning rate follows the longer cosine from there on.
    steps: int = 20_000
    # Samples in a step, over all processes and accumulation steps.
    batch_size: int = 64
    # Split each process's share of a batch into this many forward passes, to fit memory.
    accumulation_steps: int = 1
    # Data order, augmentation, noise and initial weights are functions of it.
    seed: int = 0
    # Steps between checkpoints.
    save_every: int = 2_000
    # Keep this many of the newest checkpoints; 0: all.
    keep: int = 0
    # Steps between lines of metrics.jsonl.
    log_every: int = 50
    # Send the metrics to these as well; `pip install` them first. They go on where a resumed run does.
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    # Steps between evaluations on the held-out episodes.
    eval_every: int = 1_000
    # Held-out samples of an evaluation, over all processes.
    eval_samples: int = 256
    # Go on from the last checkpoint of run_dir, or from its start where a run died before the first.
    resume: bool = False
    # Keep a running average of the trained weights with this decay, and evaluate and export it; 0: none.
    ema_decay: float = 0.0
    # Compute type of the trunk and the expert; weights, optimizer, flow matching and loss stay float32.
    precision: Literal["no", "bf16"] = "no"
    # AdamW with linear warm-up and a cosine schedule.
    optim: OptimConfig = field(default_factory=OptimConfig)

    @property
    def published_weights(self) -> str:
        """Which weights the run publishes, in words, for artifacts and policies."""
        return f"running average, decay {self.ema_decay}" if self.ema_decay else "last step"

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulation_steps", "save_every", "log_every", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"--val-fraction is a share of the episodes in [0, 1), got {self.val_fraction}")
        if self.keep < 0:
            raise ValueError(f"--keep must be 0 (all) or a number of checkpoints, got {self.keep}")


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """How a teacher is read, and which of its latents are the labels."""

    # Codes of a latent action, where a LAPA file does not say (4 if not given).
    laq_code_seq_len: int | None = None
    # Side of the teacher's images in pixels, where a LAPA file does not say (256 if not given).
    laq_image_size: int | None = None
    # The latents that are the labels: `quantized`, the codebook's rows, or `continuous`, those before quantisation.
    teacher_kind: TeacherKind = "quantized"
    # Pairs at another --data.frame-gap-s or of another --data.label-camera than those the teacher was trained on.
    accept_other_pairs: bool = False


@dataclass(frozen=True, kw_only=True)
class StageOptions(TeacherOptions):
    """The options that Stage 2 and Stage 3 share: the model, the policy's data, and whose latent actions it learns."""

    # Which recordings, and how they are read.
    data: PolicyDataConfig
    # The trunk, and which of its parts train.
    model: ModelConfig = field(default_factory=ModelConfig)
    # (noise, time) draws that are trained on one prefix pass of a sample.
    flow_draws: int = 1
    # The teacher: a .safetensors file of `python -m smolvla_shared.teacher train`, or LAPA's .pt file. With --labels
    # cache it may be left out: the cache says whose labels it holds.
    laq_ckpt: Path | None = None
    # Run the teacher in every step, or read what `python -m smolvla_shared.teacher label` has written.
    labels: Literal["online", "cache"] = "online"
    # Directory of the label cache.
    label_cache: Path | None = None

    def __post_init__(self):
        if (self.labels == "cache") != (self.label_cache is not None):
            raise ValueError(
                f"--labels cache and --label-cache <directory> belong together, got --labels {self.labels} and "
                f"--label-cache {self.label_cache}"
            )


def expert_mlp_width(hidden: int, multiple_of: int = 256) -> int:
    """The expert's SwiGLU width: two thirds of four times the hidden width, rounded up (as in Llama and SmolVLA)."""
    return multiple_of * math.ceil(4 * int(2 * hidden / 3) / multiple_of)
