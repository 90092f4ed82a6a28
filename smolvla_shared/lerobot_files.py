"""Policies in files: config, weights, processors and where they are from. A saved policy loads offline: the trunk's
config is in config.json, the tokenizer in the preprocessor's state.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils import constants as keys
from lerobot.utils.device_utils import auto_select_torch_device
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from smolvla_shared.config import CoreConfig
from smolvla_shared.data import RobotDataset
from smolvla_shared.data_views import frame_shapes
from smolvla_shared.files import (
    PROCESSORS,
    SOURCE_NAME,
    check_manifest,
    check_weights,
    file_sha256,
    find_directory,
    link_or_copy,
    read_weights,
    refusing,
    write_manifest,
    write_weights,
)
from smolvla_shared.lerobot_card import CONFIG_NAME, WEIGHTS_NAME, read_source, write_about
from smolvla_shared.lerobot_config import (
    FEATURES,
    HLRPSmolVLASharedConfig,
    feature_names,
    input_features,
    lerobot_modes,
)
from smolvla_shared.lerobot_processor import check_processors, make_hlrp_smolvla_shared_pre_post_processors
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.normalization import KINDS, Statistics, of_mode
from smolvla_shared.paths import ROBOTS
from smolvla_shared.refusals import read_json
from smolvla_shared.relative_actions import Relative
from smolvla_shared.robots import Robot, Robots

POLICY_TYPE = "hlrp_smolvla_shared"
ADAPTER_NAME, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's
WEIGHTS = WEIGHTS_NAME, ADAPTER_NAME, ADAPTER_WEIGHTS  # a policy has the first one, an adapter the others
CORE_PREFIX = "model."  # of the core's weights in WEIGHTS_NAME: the policy holds the core as `self.model`


def save_policy(
    directory: Path,
    core: CoreConfig,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
    statistics: dict[str, Statistics],
    n_action_steps: int,
    source: dict[str, Any],
    *,
    names: dict[str, tuple[str, ...] | None] | None = None,
    image_shapes: dict[str, tuple[int, ...]] | None = None,
    optional_cameras: tuple[str, ...] = (),
    fps: float | None = None,
    rename_map: dict[str, str] | None = None,
    robot: str | None = None,
    robots: tuple[str, ...] = (),
    weights_of: Path | None = None,
    relative: Relative | None = None,
) -> None:
    """Write a core as a LeRobot policy: config, weights and processors; source.json and README.md, its card; and
    manifest.json, the hashes of all but the card.

    weights:          the core's state_dict
    statistics:       of "action" and, if the core has a state, "state"
    source:           where the weights are from: JSON, for people
    names:            of the dimensions of "action" and "state", where the data has names for them
    image_shapes:     (3, height, width) of each camera as recorded, to which LeRobot's policy server stretches the
                      images that it receives. Default: the model's squares
    optional_cameras: cameras that an observation may lack
    fps:              actions a second in the training data
    rename_map:       {name of an observation as it arrives: our name}
    robot:            the name of the robot that it acts with
    robots:           those that the core was trained on, if this policy is none of theirs: it gets no processors
    weights_of:       directory of a policy with the same weights. The file there gets one more name
    relative:         the relative actions that it was trained on; None: as recorded
    """
    directory.mkdir(parents=True, exist_ok=True)
    names = names or {}
    config = HLRPSmolVLASharedConfig(
        core=core,
        normalization_mapping=lerobot_modes({name: of.mode for name, of in statistics.items()}),
        n_action_steps=n_action_steps,
        optional_cameras=optional_cameras,
        fps=fps,
        robot=robot,
        robots=robots,
        relative_actions=relative is not None,
        absolute_actions=relative.absolute_actions if relative else (),
        action_feature_names=names.get("action"),
        state_feature_names=names.get("state"),
        input_features=input_features(core, image_shapes or {}),
        device=auto_select_torch_device().type,
    )
    config.save_pretrained(directory)
    if weights_of:
        link_or_copy(weights_of / WEIGHTS_NAME, directory / WEIGHTS_NAME)
        sha256 = file_sha256(directory / WEIGHTS_NAME)
    else:
        sha256 = write_weights(directory / WEIGHTS_NAME, {CORE_PREFIX + key: value for key, value in weights.items()})
    if not robots:
        stats = lerobot_stats(statistics)
        for processor in make_hlrp_smolvla_shared_pre_post_processors(config, stats, tokenizer, rename_map):
            processor.save_pretrained(directory)
    write_about(directory, config, source | {"weights_sha256": sha256})
    processors = [path.name for path in directory.glob(PROCESSORS)]
    write_manifest(directory, (CONFIG_NAME, WEIGHTS_NAME, SOURCE_NAME, *processors))  # the card is there to be edited


def save_policies(
    directory: Path,
    core: CoreConfig,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
    statistics: dict[str, Statistics],
    n_action_steps: int,
    source: dict[str, Any],
    robots: Robots,
    datasets: list[RobotDataset],
    optional_cameras: dict[Robot, tuple[str, ...]],
) -> None:
    """Write a core as the policy of the robot that has demonstrations; as several, robots/<name>, if several have.

    datasets: of the run, demonstrations first: a robot's first one has the size of its images
    """
    several = tuple(map(str, robots.acting)) if len(robots.acting) > 1 else ()
    if several:
        of_one = robots.statistics_of(robots.acting[0], statistics)  # all are of one mode
        save_policy(directory, core, weights, tokenizer, of_one, n_action_steps, source, robots=several)
    for robot in robots.acting:
        own = robots.datasets_of(robot, datasets)
        shapes = frame_shapes([*own, *datasets], core.cameras)
        about = {"names": feature_names(own[0].features), "image_shapes": shapes, "fps": own[0].fps}
        about |= {"relative": robots.relative, "robot": robot, "optional_cameras": optional_cameras[robot]}
        about |= {"weights_of": directory} if several else {}
        of_robot = robots.core_of(robot, core), weights, tokenizer, robots.statistics_of(robot, statistics)
        place = directory / ROBOTS / robot if several else directory
        save_policy(place, *of_robot, n_action_steps, source, **about)


def of_robot(name: str | Path, robot: str | None) -> Path:
    """The directory of the policy that acts with this robot; None: the robot is not named.

    name: a policy's directory or hub id. Of a policy of several robots, the hub is asked for this robot's files alone

    Raises ValueError if the policy is of other robots, or if it is of several and none is named.
    """
    config = load_config(find_directory("policy", name, (CONFIG_NAME,)), several=True)
    if robot is None:
        config.refuse_several()
    elif robot not in (names := config.robots or (config.robot,)):
        found = ", ".join(of or "a robot without a name" for of in names)
        raise ValueError(f"there is no robot {robot} in {name}, it acts with {found}")
    return fetch(f"{name}/{ROBOTS}/{robot}" if config.robots else name)


def lerobot_stats(statistics: dict[str, Statistics]) -> dict[str, dict[str, Tensor]]:
    """Statistics of state and action as LeRobot's processors take them: {feature: {"mean": [A], "std": [A], ...}}."""
    return {
        feature: {of: torch.tensor(values) for of, values in statistics[name].named().items()}
        for name, feature in FEATURES.items()
        if name in statistics
    }


def fetch(name: str | Path, **hub: Any) -> Path:
    """The directory of a policy, or of a PEFT adapter of one; from the hub, if there is none of this name.

    hub: LeRobot's options of a download (revision, token, cache_dir, ...). Raises ValueError for anything else.
    """
    directory = find_directory("policy", name, (CONFIG_NAME,), optional=WEIGHTS, **hub)
    if not (directory / ADAPTER_NAME).is_file():
        find_directory("policy", directory, (WEIGHTS_NAME,))
    return directory


def find_policy(name: str | Path, **hub: Any) -> Path:
    """`fetch`, verified. Raises ValueError, too, where the files are not those that were written, and for processors
    that are not this policy's.
    """
    directory = fetch(name, **hub)
    read = [directory / name for name in (CONFIG_NAME, *WEIGHTS)] + [*directory.glob(PROCESSORS)]
    if unknown := sorted({path.name for path in read if path.is_file()} - check_manifest(directory)):
        logging.warning(
            f"{directory} has no hash of {', '.join(unknown)} (LeRobot's commands write none): checked are names, "
            "shapes and finite numbers, not that the files are what was written"
        )
    check_processors(directory)
    return directory


def load_config(
    directory: Path, cli_overrides: list[str] | None = None, several: bool = False
) -> HLRPSmolVLASharedConfig:
    """several: whether it may be of several robots"""
    path = directory / CONFIG_NAME
    if not isinstance(kind := read_json(path).get("type"), str):
        raise ValueError(f"{path} names no type of a policy, it has type {kind!r}")
    with refusing(f"{path} does not describe a policy"):  # a field is unknown, or has a value of another type
        config = PreTrainedConfig.from_pretrained(directory, cli_overrides=cli_overrides or [])
    if not isinstance(config, HLRPSmolVLASharedConfig):
        raise ValueError(f"{directory} holds a policy of type {config.type}, expected {POLICY_TYPE}")
    if not cli_overrides and not (config.input_features and config.output_features):  # options may ask for null
        raise ValueError(
            f"{path} does not describe a policy: input_features or output_features are null: copy it again"
        )
    if not several:
        config.refuse_several()
    return config


def load_weights(directory: Path, core: CoreConfig | None) -> dict[str, Tensor]:
    """The weights of a saved policy, for a core of this config; an adapter is merged into its base.

    Raises ValueError unless they are exactly that core's.
    """
    if core is None:
        raise ValueError(f"{directory / CONFIG_NAME} has no core, which describes the model: copy the directory again")
    if (directory / ADAPTER_NAME).is_file():
        return _merge_adapter(directory, core)
    found = read_weights(directory / WEIGHTS_NAME)
    with refusing(f"{directory / CONFIG_NAME} describes a model that cannot be built"), torch.device("meta"):
        expected = SmolVLASharedCore(core).state_dict()
    check_weights(str(directory), {CORE_PREFIX + name: tensor for name, tensor in expected.items()}, found)
    return {name.removeprefix(CORE_PREFIX): tensor for name, tensor in found.items()}


def _merge_adapter(directory: Path, config: CoreConfig) -> dict[str, Tensor]:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(f"{directory} holds a PEFT adapter: pip install 'lerobot[peft]'") from error
    base = read_json(directory / ADAPTER_NAME).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ValueError(f"{directory / ADAPTER_NAME} names no base: base_model_name_or_path is {base!r}")
    core = SmolVLASharedCore(config)
    core.load_state_dict(load_weights(find_policy(base), config))
    holder = nn.ModuleDict({CORE_PREFIX.rstrip("."): core})  # the adapter's names are those in the policy
    adapter = read_weights(directory / ADAPTER_WEIGHTS)
    if broken := [name for name, tensor in adapter.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{directory / ADAPTER_WEIGHTS} is not finite: {', '.join(broken)}: copy it again")
    with refusing(f"the PEFT adapter in {directory} does not go with its base {base}"):
        PeftModel.from_pretrained(holder, directory).merge_and_unload()
    return core.state_dict()


@dataclass(frozen=True)
class SavedPolicy:
    """A saved policy, in the core's terms."""

    config: HLRPSmolVLASharedConfig
    weights: dict[str, Tensor]  # the core's state_dict
    tokenizer: PreTrainedTokenizerFast
    stats: dict[str, dict[str, Tensor]]  # LeRobot's: {feature: {"mean": [A], ...}}
    rename_map: dict[str, str]  # {name of an observation as it arrives: our name}
    source: dict[str, Any]  # where the weights are from: source.json

    @property
    def statistics(self) -> dict[str, Statistics]:
        """Of "action" and, if the core has a state, "state". Raises ValueError where others than KINDS normalise, or
        some are missing.
        """
        modes = {name: self.config.normalization_mapping[name.upper()].value.lower() for name in FEATURES}
        if other := {name: mode.upper() for name, mode in modes.items() if mode not in KINDS}:
            raise ValueError(f"this policy normalises {other}, here it is by mean and standard deviation or quantiles")
        return {
            name: of_mode(modes[name], {of: torch.as_tensor(x).tolist() for of, x in self.stats[feature].items()})
            for name, feature in FEATURES.items()
            if feature in self.stats
        }


def load_saved(name: str) -> SavedPolicy:
    """Read a policy back from its directory or hub id. Raises ValueError where a part is missing or does not fit."""
    directory = find_policy(name)
    config = load_config(directory)
    file = f"{keys.POLICY_PREPROCESSOR_DEFAULT_NAME}.json"
    find_directory("policy", directory, (file,))
    with refusing(f"{directory / file} cannot be built"):  # a step does not take its config
        pipeline = PolicyProcessorPipeline.from_pretrained(directory, config_filename=file)
    rename, _, *_, tokenize, _, normalize = pipeline.steps
    about = tokenize.tokenizer, normalize.stats, rename.rename_map, read_source(directory)
    return SavedPolicy(config, load_weights(directory, config.core), *about)
