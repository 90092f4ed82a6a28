"""What examples/evidence.py compares: settings, arms, sizes and seeds."""

from dataclasses import dataclass
from typing import Literal

from lerobot.utils.constants import OBS_IMAGES


@dataclass(frozen=True)
class Setting:
    """The tasks of one policy: it has seen video of all of them, and as many demonstrations of each that has any."""

    tasks: tuple[str, ...]
    # Those of which there is video alone. The other tasks have as many demonstrations as if all had some.
    video_only: tuple[str, ...] = ()
    # Disturbances of the demonstrations (record_metaworld.py --noise).
    noise: float = 0.0
    # Environment steps after which an episode of a rollout has failed.
    max_steps: int = 150
    # Options of Stage 2 and Stage 3.
    options: str = ""
    # Meta-World's cameras that are recorded, and that the teacher sees; (): LeRobot's choice.
    cameras: tuple[str, ...] = ()
    # Of the video. It and the rollouts begin after up to so many steps of a random motion, demonstrations at rest.
    video_noise: float = 0.3
    video_start: int = 0
    start: int = 0

    @property
    def sees(self) -> str:
        """Options of a policy that sees the first of several cameras."""
        return f" --data.cameras {OBS_IMAGES}.{self.cameras[0]}" if len(self.cameras) > 1 else ""

    @property
    def teacher_sees(self) -> str:
        """Options of a teacher, and of labels that are no teacher's, where there are several cameras."""
        cameras = " ".join(f"{OBS_IMAGES}.{camera}" for camera in self.cameras)
        return f" --data.label-cameras {cameras}" if len(self.cameras) > 1 else ""


FIVE = "drawer-open-v3", "door-open-v3", "plate-slide-v3", "coffee-button-v3", "window-open-v3"
TWO = "topview", "corner2"
SETTINGS = {
    "five tasks": Setting(FIVE),
    "five tasks from above": Setting(FIVE, cameras=("topview",)),
    "five tasks, two cameras": Setting(FIVE, cameras=TWO),
    "five tasks, video of other starts": Setting(FIVE, cameras=TWO, video_noise=0.0, video_start=20),
    "five tasks, other starts": Setting(FIVE, cameras=TWO, video_noise=0.0, video_start=20, start=20),
    "three tasks of five": Setting(
        FIVE, ("door-open-v3", "coffee-button-v3"), cameras=TWO, video_noise=0.0, video_start=20, start=20
    ),
    "five tasks, no state": Setting(FIVE, options="--model.no-use-state"),
}
QUICK_SETTING = Setting(FIVE[:1], max_steps=16)


@dataclass(frozen=True)
class Sizes:
    video_episodes: int = 125  # of all tasks together, as are those below
    teacher_steps: int = 1500
    stage2_steps: int = 1200
    stage3_steps: int = 2400
    batch_size: int = 16
    flow_draws: int = 4
    rollouts: int = 100  # episodes of each policy
    held_out_episodes: int = 50


QUICK = Sizes(2, 2, 2, 2, batch_size=4, flow_draws=1, rollouts=1, held_out_episodes=1)
DEMONSTRATIONS = (5, 10, 25)  # of all tasks together
SEEDS = (0, 1, 2)
# Video and held-out demonstrations are recorded with these seeds, demonstrations with the run's. Rollouts of run seed s
# have the initial states of seeds s * ROLLOUT_SEEDS and up. Nothing was tuned on any of them.
VIDEO_SEED, HELD_OUT_SEED, ROLLOUT_SEEDS = 50, 60, 1_000
IMAGE_SIZE = 64  # the tiny preset's
# A teacher's pair, a chunk of 16 actions at 80 fps, and how many pairs it takes.
GAP_S, CHUNK_S, HORIZON = 0.05, 0.2, 4
STAGES = "--optim.lr 1e-3"
STAGE3 = "--chunk-size 16 --n-action-steps 8 --ema-decay 0.99"


@dataclass(frozen=True)
class Labels:
    """Latent actions of the video."""

    # grounded teacher: grounded in the demonstrations. executed: the actions between the frames of a pair, as a perfect
    # teacher would give them. shuffled: the teacher's, each to another frame.
    source: Literal["teacher", "random teacher", "grounded teacher", "shuffled", "executed"] = "teacher"
    kind: Literal["quantized", "continuous"] = "quantized"
    # Latent actions in a row.
    horizon: int = HORIZON
    gap_s: float = GAP_S


CODES, CONTINUOUS = Labels(), Labels(kind="continuous")


@dataclass(frozen=True)
class Arm:
    """What a policy learns from the video."""

    # Labels of Stage 2, and of the video in Stage 3.
    labels: Labels | None = None
    # Whether there is a Stage 2, and its options.
    stage2: bool = True
    options: str = ""
    # Options of both stages.
    of_both: str = ""
    # Options of a Stage 3 that trains on the video, too.
    stage3: str = ""
    # Stage 3 has Stage 2's steps besides its own.
    has_all_compute: bool = False
    # Stage 3 is given the video's actions.
    has_all_labels: bool = False

    @property
    def decodes(self) -> bool:
        return "--decode-actions" in self.stage3


DECODES = "--decode-actions --video-share 0.75"
AUGMENTED = "--data.random-shift 0.05 --data.random-brightness 0.2 --data.random-contrast 0.2"
AUGMENTED += " --data.random-saturation 0.5 --data.random-hue 0.05"
ARMS = {
    "scratch": Arm(),
    "stage 2": Arm(CODES),
    "co-training": Arm(CODES, stage3="--latent-loss-weight 0.5"),
    "decoded": Arm(CONTINUOUS, stage3=DECODES),
    "decoded, no stage 2": Arm(CONTINUOUS, stage2=False, stage3=DECODES),
    "decoded, random teacher": Arm(Labels("random teacher", "continuous"), stage3=DECODES),
    "continuous": Arm(CONTINUOUS),
    "one latent action": Arm(Labels(horizon=1)),
    "cross-entropy": Arm(CODES, options="--latent-head codes"),
    "stage 2, grounded teacher": Arm(Labels("grounded teacher")),
    "stage 2, state dropout": Arm(CODES, options="--data.state-dropout 0.5"),
    "augmented": Arm(CODES, of_both=AUGMENTED),
    "random teacher": Arm(Labels("random teacher")),
    "shuffled latents": Arm(Labels("shuffled")),
    "true actions": Arm(Labels("executed", "continuous", 1, CHUNK_S)),
    "scratch, all compute": Arm(has_all_compute=True),
    "all labels": Arm(has_all_labels=True),
}
# Success is also measured at a third and two thirds of Stage 3 for these arms, at this number of demonstrations.
CURVE_ARMS, CURVE_DEMONSTRATIONS = ("scratch", "stage 2", "decoded"), 10
