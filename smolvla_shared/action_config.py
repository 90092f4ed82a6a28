"""The options of Stage 3's actions."""

from dataclasses import dataclass
from typing import Literal

from smolvla_shared import ranges
from smolvla_shared.config import StageOptions


@dataclass(frozen=True, kw_only=True)
class ActionOptions(StageOptions):
    """How many actions, how they are normalised, and from where they are measured."""

    # Actions in a chunk, which the policy predicts at once.
    chunk_size: ranges.Few = 50
    # Actions executed of each chunk before the next chunk is predicted; saved with the policy.
    n_action_steps: ranges.Few = 10
    # Statistics that normalise state and action. data: those of the labelled datasets. artifact: those of the artifact
    # or policy to start from.
    normalization: Literal["data", "artifact"] = "data"
    # Learn actions as differences to the state at their chunk's first frame. For recorded actions that are absolute
    # positions of what the state measures, in its order, such as the target and the present angle of each joint.
    relative_actions: bool = False
    # Actions that --relative-actions leaves as recorded: those with one of these in their names.
    absolute_actions: tuple[str, ...] = ("gripper",)

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(
                f"--n-action-steps {self.n_action_steps} must be between 1 and --chunk-size {self.chunk_size}"
            )
        own = "normalization_mode relative_actions"
        ranges.refuse_without(self, self.normalization == "data", "--normalization data", own)
        ranges.refuse_without(self, self.relative_actions, "--relative-actions", "absolute_actions")
