"""Configuration: frozen dataclasses, from the command line (tyro turns the comments into --help) to the manifest.

`CoreConfig` is the one description of a model: `SmolVLASharedCore(CoreConfig(**fields))` rebuilds it offline from an
artifact's manifest or a policy's config.json. The other classes are the option groups of the scripts.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import tyro

from smolvla_shared import idle_options, paths, ranges
from smolvla_shared.mixture import DatasetEntry, plain_entries, read_mixture

TeacherKind = Literal["quantized", "continuous"]
NormalizationMode = Literal["mean_std", "quantiles"]  # LeRobot's names, in lower case
LATENT, ACTION = "latent", "action"  # the names of the two flow-matching targets, wherever they are dictionary keys


@dataclass(frozen=True)
class CoreConfig:
    """Everything that determines the shape and the numbers of a `SmolVLASharedCore`."""

    # Where the trunk's architecture, weights and tokenizer came from: a hub id, a local directory, or `tiny`.
    model_name: str
    # Hub revision of model_name; None: the newest, or model_name is no hub id.
    model_revision: str | None
    # The trunk's full transformers configuration (SmolVLMConfig.to_dict()), so that a rebuild works offline.
    vlm: dict[str, Any]
    # Camera keys in the order in which their tokens enter the prefix.
    cameras: tuple[str, ...]
    # Side of the square that every image is padded to, pixels.
    image_size: ranges.Size
    # Language layers of the trunk that are kept, from the first; SmolVLA keeps half of SmolVLM2-500M's 32.
    num_trunk_layers: ranges.Layers = 16
    # dtype of the trunk's weights in memory and in files; bfloat16 if it does not train. All else is always float32.
    torch_dtype: Literal["float32", "bfloat16"] = "float32"
    # Longer texts are truncated to this many tokens; shorter ones are padded to the longest of their batch, rounded up.
    max_text_tokens: ranges.Few = 48
    # Token ids (fake_image, global_image) put around each camera's tokens; () = none, as in the released SmolVLA.
    image_special_tokens: tuple[int, ...] = ()
    # Width of the proprioceptive state (0: no state), and the width it is zero-padded to.
    state_dim: ranges.SizeOrNone = 0
    max_state_dim: ranges.Size = 32
    # Flattened width of M latent actions in a row, M * S * D (0: no latent head), and their number of tokens M * S.
    latent_vector_dim: ranges.Width = 0
    code_seq_len: ranges.SizeOrNone = 0
    # Rows C of the teacher's codebook, if the latent head classifies its codes; 0: it is a flow-matching head.
    codebook_size: ranges.SizeOrNone = 0
    # Width of an action (0: no action head), the width it is zero-padded to, and the number of actions in a chunk.
    action_dim: ranges.SizeOrNone = 0
    max_action_dim: ranges.Size = 32
    chunk_size: ranges.Few = 50
    # Whether the padded dimensions of noisy actions carry noise, as in LeRobot's SmolVLA, which learns to remove it;
    # else they are zeros. The loss does not count them: their noise would drift in sampling.
    noisy_padding: bool = False
    # Width of the expert as a share of the trunk's. Layers 0, n, 2n, ... of the expert are self-attention, the others
    # cross-attention.
    expert_width_multiplier: ranges.Positive = 0.75
    self_attn_every_n_layers: ranges.Count = 2
    # Euler steps of a sample; shortest and longest period of the time embedding; Beta distribution of the action head's
    # training times.
    flow_steps: ranges.Few = 10
    min_period: ranges.Positive = 4e-3
    max_period: ranges.Positive = 4.0
    time_beta_alpha: ranges.Positive = 1.5
    time_beta_beta: ranges.Positive = 1.0
    # Beta distribution of the latent head's training times, near 1, pure noise. Codes are many noise deviations apart:
    # at smaller times the noisy latent itself tells its code, and nothing is learned from the image.
    latent_time_beta_alpha: ranges.Positive = 6.0
    latent_time_beta_beta: ranges.Positive = 1.0

    def __post_init__(self):
        object.__setattr__(self, "cameras", tuple(self.cameras))  # JSON has lists
        object.__setattr__(self, "image_special_tokens", tuple(self.image_special_tokens))
        ranges.check(self)
        ranges.check_sizes("vlm", self.vlm)
        ranges.refuse_twice("cameras", self.cameras)
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

    @property
    def time_beta(self) -> dict[str, tuple[float, float]]:
        """The Beta distribution (alpha, beta) of each target's training times."""
        return {
            ACTION: (self.time_beta_alpha, self.time_beta_beta),
            LATENT: (self.latent_time_beta_alpha, self.latent_time_beta_beta),
        }


TINY = "tiny"  # the model_name of the trunk that ships with this package
PRESETS = {"smolvlm2-500m": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct", TINY: TINY}


@dataclass(frozen=True)
class ModelConfig:
    # The trunk: `smolvlm2-500m` is SmolVLA's, with pretrained weights; `tiny` ships with this package (random weights,
    # for CPUs, tests and the demo). Default: smolvlm2-500m, or the trunk of the artifact or policy to start from.
    preset: Literal["smolvlm2-500m", "tiny"] | None = None
    # Hub id or local directory of a SmolVLM to use as the trunk, instead of --model.preset.
    name: paths.Trunk | None = None
    # Hub revision (branch, tag or commit) of the trunk; recorded in the manifest.
    revision: str | None = None
    # Weights to start from, instead of a fresh expert on the trunk's own: a directory or hub id of a LeRobot SmolVLA
    # policy (lerobot/smolvla_base) or of this project's policy, or a Stage 2 artifact (.safetensors). --data.cameras
    # replace its cameras in order; without --data.cameras your data must have cameras of the same names.
    init_from: Annotated[paths.Initial | None, tyro.conf.arg(prefix_name=False)] = None
    # Do not train the vision tower and connector. Default: frozen if the trunk has pretrained weights.
    freeze_vision: bool | None = None
    # Do not train the trunk: vision tower, connector and language layers. Default: frozen if it has pretrained weights.
    freeze_trunk: bool | None = None
    # Do not train the projection of the proprioceptive state.
    freeze_state_projection: bool = False
    # Give the model the proprioceptive state. Samples of datasets without a state are masked.
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
        return self.name or PRESETS.get(self.preset)


DEFAULT_GAP_S = 0.5  # the frame gap where no teacher has one of its own, seconds


@dataclass(frozen=True)
class DataConfig:
    """Which recordings, and which pairs of their frames."""

    # Hub ids of LeRobotDatasets (v3). A copy in the local LeRobot cache is used, else the dataset is downloaded.
    repo_ids: tuple[paths.HubDataset, ...] = ()
    # Local directories of LeRobotDatasets (v3); may be combined with --data.repo-ids.
    roots: tuple[paths.Dataset, ...] = ()
    # YAML file of unlike datasets, instead of these two: each with its weight, the policy's names of its cameras, its
    # label camera and its frame gap (docs/data.md).
    mixture: paths.File | None = None
    # What the mixture file held: the settings of the run, whatever becomes of the file.
    mixture_entries: tuple[DatasetEntry, ...] = field(init=False, default=())
    # How much of a batch each dataset is, hub ids first, relative to the others. Default: what --data.balance says.
    weights: tuple[ranges.Positive, ...] = ()
    # Without weights. frames: every frame counts the same. sqrt: a dataset counts as the square root of its frames.
    balance: Literal["frames", "sqrt"] = "frames"
    # Camera keys to use, in this order; a dataset may lack some, which are then masked. Default: those of the mixture,
    # else every camera that all datasets have, in the first dataset's order.
    cameras: tuple[str, ...] = ()
    # Cameras of the teacher's pairs: a latent action is of all. Default: the teacher's own, else the first camera.
    label_cameras: tuple[str, ...] = ()
    # Time between the two frames of a pair, seconds. Default: the teacher's own, else 0.5 (LAPA's files do not say).
    frame_gap_s: ranges.Positive | None = None
    # Loader processes of each training process; 0: the training process loads the data itself.
    num_workers: ranges.ProcessesOrNone = 4

    def __post_init__(self):
        if not self.repo_ids and not self.roots and not self.mixture:
            raise ValueError(
                "no dataset given: pass --data.repo-ids (hub ids), --data.roots (local directories) or --data.mixture"
            )
        ranges.check(self, "--data.")
        ranges.refuse_twice("--data.cameras", self.cameras)
        ranges.refuse_twice("--data.label-cameras", self.label_cameras)
        ranges.refuse_twice("--data.repo-ids and --data.roots", self.repo_ids + self.roots)
        if self.weights and len(self.weights) != (number := len(self.repo_ids) + len(self.roots)):
            raise ValueError(f"--data.weights {self.weights}: pass a number for each of {number} dataset(s)")
        if self.mixture:
            ranges.refuse_beside(self, f"--data.mixture {self.mixture}", "repo_ids roots weights", "--data.")
            object.__setattr__(self, "mixture_entries", read_mixture(self.mixture))
        if self.balance != "frames" and any(entry.weight for entry in self.entries):
            raise ValueError(f"--data.balance {self.balance} and weights both say how much a dataset counts: drop one")

    @property
    def entries(self) -> tuple[DatasetEntry, ...]:
        """The datasets: those of the mixture, or the hub ids, then the roots."""
        return self.mixture_entries or plain_entries(self.repo_ids, self.roots, self.weights)

    @property
    def gap_s(self) -> float:
        """The frame gap where no teacher has one of its own, seconds."""
        return DEFAULT_GAP_S if self.frame_gap_s is None else self.frame_gap_s


@dataclass(frozen=True)
class PolicyDataConfig(DataConfig):
    """Which recordings, and how a policy trains on them."""

    # Train on so many episodes of each dataset, drawn with --seed (not of --video-roots). Those of a smaller number are
    # among those of a larger one, and the held-out episodes are the same for all. Default: all.
    max_episodes: ranges.Count | None = None
    # Read only these episodes of each dataset, by their numbers from 0 (not of --video-roots), those that
    # --val-fraction holds out among them. Default: all.
    episodes: tuple[ranges.CountOrNone, ...] = ()
    # In training, shift the policy's images (not the teacher's) at random by up to this share of their side. All images
    # of a sample change alike: by this option, and by the next five, which are LeRobot's image transforms.
    random_shift: ranges.ShareBelowOne = 0.0
    # Multiply the brightness of the images by a random factor between 1 - x and 1 + x.
    random_brightness: ranges.ShareBelowOne = 0.0
    # The same for their contrast.
    random_contrast: ranges.ShareBelowOne = 0.0
    # The same for their saturation. A factor of 0 makes them grey.
    random_saturation: ranges.Share = 0.0
    # Turn the hue by up to this share of the circle of colours, either way.
    random_hue: ranges.ShareOfHalf = 0.0
    # Multiply the sharpness by a random factor between 1 - x and 1 + x. A factor of 0 blurs.
    random_sharpness: ranges.Share = 0.0
    # In training, hide the state of this share of the samples: a state may give the motion away without the image.
    state_dropout: ranges.Share = 0.0
    # Directory of the feature cache: the frozen vision tower's output for every frame, computed once before training.
    # Every run with the same tower and data can use the same directory.
    feature_cache: paths.Directory | None = None
    # Type of the cached features. bfloat16 takes half the space and keeps 8 significant bits.
    feature_cache_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # Largest size of the feature cache on disk, GB (10^9 bytes).
    feature_cache_gb: ranges.Positive = 100.0

    def __post_init__(self):
        super().__post_init__()
        ranges.refuse_twice("--data.episodes", self.episodes)
        if self.max_episodes:
            ranges.refuse_beside(self, f"--data.max-episodes {self.max_episodes}", "episodes", "--data.")
        unused = "feature_cache_dtype feature_cache_gb"
        ranges.refuse_without(self, self.feature_cache is not None, "--data.feature-cache", unused, "--data.")
        if self.feature_cache and self.image_augmentation:
            stated = [f"--data.{name.replace('_', '-')} {x}" for name, x in self.image_augmentation.items()]
            raise ValueError(
                f"--data.feature-cache keeps features of the frames as recorded, but {', '.join(stated)} would train "
                "on others: drop one of them"
            )

    @property
    def image_augmentation(self) -> dict[str, float]:
        """Those of the options random_* that change something, in LeRobot's order."""
        return {name: x for name, x in vars(self).items() if name.startswith("random_") and x}

    @property
    def augmentation(self) -> dict[str, float]:
        return self.image_augmentation | {"state_dropout": self.state_dropout}


WARMUP_STEPS = 500


@dataclass(frozen=True)
class OptimConfig:
    most_warmup_steps: ClassVar[int] = WARMUP_STEPS  # where none are stated, and at most a tenth of the run
    # Peak learning rate of AdamW.
    lr: ranges.Rate = 1e-4
    # Steps of linear warm-up from 0. Default: 500, or a tenth of the run if that is less.
    warmup_steps: ranges.CountOrNone | None = None
    # The cosine schedule ends at this share of the peak learning rate.
    final_lr_share: ranges.Share = 0.025
    # Decay rates of AdamW's two moments: of the gradient and of its square.
    betas: tuple[ranges.ShareBelowOne, ranges.ShareBelowOne] = (0.9, 0.95)
    # Weight decay of AdamW.
    weight_decay: ranges.NotNegative = 1e-10
    # Gradients with a larger norm are scaled down to this norm; inf: no limit.
    max_grad_norm: ranges.Norm = 10.0

    def __post_init__(self):
        ranges.check(self, "--optim.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options that mean the same in every training command."""

    # Directory of the run: config.json, metrics.jsonl, curves.png, checkpoints/. Must be new unless --resume is given.
    run_dir: paths.RunDirectory
    # Which recordings, and how they are read.
    data: DataConfig
    # Share of each dataset's episodes held out for evaluation, at least one episode; 0: train on all. Default: 0.05 of
    # a dataset of 20 episodes or more, nothing of a smaller one.
    val_fraction: ranges.ShareBelowOne | None = None
    # Optimizer steps of the run. May be raised with --resume: the learning rate then follows the longer cosine.
    steps: ranges.Count = 20_000
    # Samples in a step, summed over all processes and accumulation steps.
    batch_size: ranges.Count = 64
    # Forward passes that each process's share of a batch is split into. More passes take less memory.
    accumulation_steps: ranges.Count = 1
    # Seed of the data order, augmentation, noise and initial weights.
    seed: ranges.Seed = 0
    # Steps between checkpoints.
    save_every: ranges.Count = 2_000
    # Keep this many of the newest checkpoints; 0: all.
    keep: ranges.CountOrNone = 0
    # Steps between lines of metrics.jsonl.
    log_every: ranges.Count = 50
    # Send the metrics to these as well; `pip install` them first. A resumed run continues its records.
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    # Steps between evaluations on the held-out episodes.
    eval_every: ranges.Count = 1_000
    # Held-out samples of an evaluation, summed over all processes.
    eval_samples: ranges.Count = 256
    # Continue the run in --run-dir from its last checkpoint, or from step 0 if it has none yet.
    resume: bool = False
    # Keep an exponential moving average (EMA) of the trained weights with this decay; evaluate and export the EMA.
    # 0: no EMA, the last weights are evaluated and exported.
    ema_decay: ranges.ShareBelowOne = 0.0
    # bf16: trunk and expert compute in bfloat16, in which a frozen trunk is stored. Other weights are always float32.
    # Default: mixed_precision of the Accelerate configuration, else no (float32).
    precision: Literal["no", "bf16"] | None = None
    # AdamW with linear warm-up and a cosine schedule.
    optim: OptimConfig = field(default_factory=OptimConfig)

    @property
    def published_weights(self) -> str:
        """The weights that the run exports, in words: "last step" or "EMA, decay 0.999"."""
        return f"EMA, decay {self.ema_decay}" if self.ema_decay else "last step"

    def __post_init__(self):
        ranges.check(self, "--")
        idle_options.check_run(self)


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """How a teacher is read, and which of its latents are the labels."""

    # Codes in a latent action, for a LAPA file that does not record it (default 4).
    laq_code_seq_len: ranges.Count | None = None
    # Side of the teacher's images in pixels, for a LAPA file that does not record it (default 256).
    laq_image_size: ranges.Count | None = None
    # Which latents are the labels. quantized: the codebook's entries. continuous: the latents before quantisation.
    teacher_kind: TeacherKind = "quantized"
    # Pairs at another --data.frame-gap-s or of another --data.label-cameras than those the teacher was trained on.
    accept_other_pairs: bool = False


@dataclass(frozen=True, kw_only=True)
class StageOptions(TeacherOptions):
    """The options that Stage 2 and Stage 3 share: the model, its data, and the teacher whose labels it learns."""

    # Which recordings, and how they are read.
    data: PolicyDataConfig
    # The trunk, and which of its parts train.
    model: ModelConfig = field(default_factory=ModelConfig)
    # (noise, time) draws of each sample that share one prefix pass. More draws cost less than more samples.
    flow_draws: ranges.Count = 1
    # The teacher: a .safetensors file of `python -m smolvla_shared.teacher train`, or LAPA's .pt file. Not needed with
    # --labels cache, which records its teacher.
    laq_ckpt: paths.Teacher | None = None
    # online: run the teacher in every step. cache: read the labels that `python -m smolvla_shared.teacher label` wrote.
    labels: Literal["online", "cache"] = "online"
    # Directory of the label cache, for --labels cache.
    label_cache: paths.Labels | None = None
    # flow: the latent head generates latent actions by flow matching, as the action head does actions. codes: it
    # classifies the teacher's codes (cross-entropy); needs --teacher-kind quantized. Default: that of the latent head
    # to start from, else flow.
    latent_head: Literal["flow", "codes"] | None = None
    # Latent actions in a row that the latent head predicts, each over --data.frame-gap-s: 4 of 0.05 s look as far ahead
    # as a chunk of 0.2 s. Default: those of the latent head to start from, else 1.
    latent_horizon: ranges.Count | None = None
    # How state and actions are normalised. mean_std: to mean 0 and standard deviation 1. quantiles: so that a hundredth
    # of the values is below -1, and a hundredth above 1, wherever outliers are; nothing is clipped. Default: as in the
    # weights to start from, else mean_std.
    normalization_mode: NormalizationMode | None = None

    def __post_init__(self):
        if (self.labels == "cache") != (self.label_cache is not None):
            raise ValueError(
                f"--labels cache and --label-cache <directory> belong together, got --labels {self.labels} and "
                f"--label-cache {self.label_cache}"
            )
        if self.latent_head == "codes" and self.teacher_kind != "quantized":
            raise ValueError(f"--latent-head codes classifies codes, --teacher-kind {self.teacher_kind} has none")
        idle_options.check_stage(self)

    @property
    def start(self) -> Any:  # the weights to start from, by their name; None: the trunk's own
        return self.model.init_from
