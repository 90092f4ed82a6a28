"""LeRobot's SmolVLA checkpoints, in and out: configuration, weights, statistics and tokenizer.

Left out is what no action depends on: the trunk's final norm and output layer, unused language layers, options of
training and execution, and the masked padding of text and prefix (pad_language_to, prefix_length).
"""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.utils import constants as keys
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from smolvla_shared import ranges
from smolvla_shared.config import CoreConfig, NormalizationMode
from smolvla_shared.files import check_weights, find_directory, public_state, read_weights, refusing, write_weights
from smolvla_shared.lerobot_config import FEATURES, input_features, output_features
from smolvla_shared.lerobot_files import CONFIG_NAME, WEIGHTS_NAME, SavedPolicy
from smolvla_shared.lerobot_processor import read_steps
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.normalization import KINDS, Statistics, of_mode
from smolvla_shared.refusals import decode_known, read_json
from smolvla_shared.trunk_files import load_trunk_config, load_trunk_tokenizer, pack_tokenizer, trunk_location

if TYPE_CHECKING:  # LeRobot's policies take seconds to import
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

PROCESSORS = (keys.POLICY_PREPROCESSOR_DEFAULT_NAME, keys.POLICY_POSTPROCESSOR_DEFAULT_NAME)
EMPTY_CAMERA = "observation.images.empty_camera_"  # LeRobot numbers the cameras that observations may lack

# --- names ------------------------------------------------------------------------------------------------------------

TRUNK = "model.vlm_with_expert.vlm.model."
LEROBOT_PREFIX = {  # {our prefix: LeRobot's}
    "trunk.vlm.": TRUNK,
    "expert.": "model.vlm_with_expert.lm_expert.",
    "state_proj.": "model.state_proj.",
    "action_head.": "model.action_",
}
IN_PROJ = "model.action_in_proj.weight"
TOKEN_EMBEDDING = "trunk.vlm.text_model.embed_tokens.weight"  # our name
FINAL_NORM = TRUNK + "text_model.norm.weight"
OUTPUT_LAYER = "model.vlm_with_expert.vlm.lm_head.weight"
LANGUAGE_LAYER = re.compile(re.escape(TRUNK) + r"text_model\.layers\.(\d+)\.")
NORMALIZATION_BUFFER = re.compile(r"(normalize_inputs|normalize_targets|unnormalize_outputs)\.")
# In processors: observation.state.mean, so100.buffer.action.std. In normalization buffers, behind their prefix:
# buffer_observation_state.mean, so100_buffer_action.std.
STATISTIC = re.compile(
    rf"(?:{NORMALIZATION_BUFFER.pattern})?(?:(?P<robot>.+)[._](?=buffer))?(?:buffer[._])?"
    r"(?P<feature>observation[._]state|action)\.(?P<statistic>mean|std|q01|q99)"
)
# {field of CoreConfig: LeRobot's name}, for the fields that are copied in both directions.
SAME = "chunk_size max_state_dim max_action_dim min_period max_period expert_width_multiplier self_attn_every_n_layers"
LEROBOT_OPTION = {name: name for name in SAME.split()}
LEROBOT_OPTION |= {"max_text_tokens": "tokenizer_max_length", "flow_steps": "num_steps"}


def lerobot_names(weights: dict[str, Tensor]) -> dict[str, str]:
    """{our name: LeRobot's} of a core's weights, without the latent head, which SmolVLA does not have."""
    return {
        name: theirs + name.removeprefix(ours)
        for name in public_state(weights)
        for ours, theirs in LEROBOT_PREFIX.items()
        if name.startswith(ours)
    }


def is_unread(name: str, num_layers: int) -> bool:
    """Whether no action depends on LeRobot's tensor of this name, if `num_layers` language layers are kept."""
    layer = LANGUAGE_LAYER.match(name)
    return name in (FINAL_NORM, OUTPUT_LAYER) or (layer is not None and int(layer[1]) >= num_layers)


def _statistic(where: str) -> tuple[str | None, str, str] | None:
    """(robot or None, feature, statistic) of the tensor at "file: key"; None for a tensor that is not needed."""
    match = STATISTIC.fullmatch(where.split(": ")[1])
    return match and (match["robot"], match["feature"].replace("_", "."), match["statistic"])


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A LeRobot SmolVLA policy, in our terms."""

    name: str  # as the user gave it
    core: CoreConfig
    weights: dict[str, Tensor]  # by our names
    unread: tuple[str, ...]  # LeRobot's names of the tensors that were left out
    tokenizer: PreTrainedTokenizerFast
    modes: dict[str, NormalizationMode]  # by "state" and "action"
    statistics: dict[str, Tensor]  # by "file: key"
    image_shapes: dict[str, tuple[int, ...]]  # (3, height, width) by camera
    optional_cameras: tuple[str, ...]
    rename_map: dict[str, str]  # {name of an observation as it arrives: our name}
    n_action_steps: int

    @property
    def cameras(self) -> tuple[str, ...]:
        """The cameras that observations must have."""
        return tuple(key for key in self.core.cameras if key not in self.optional_cameras)

    def normalization(self, robot: str | None = None) -> dict[str, Statistics]:
        """The statistics of state and action; `robot` chooses among those of several robots.

        Raises ValueError, listing all keys, if a statistic is missing, has two values, has another width than its
        feature, or is not finite.
        """
        statistic_of = {where: _statistic(where) for where in self.statistics}
        result, problems = {}, []
        for name, width in (("state", self.core.state_dim), ("action", self.core.action_dim)):
            feature, values = FEATURES[name], {}
            for statistic in (names := KINDS[self.modes[name]].names()):
                found = [where for where, what in statistic_of.items() if what == (robot, feature, statistic)]
                tensors = [self.statistics[where] for where in found]
                if not found:
                    problems.append(f"missing: {feature}.{statistic}")
                elif any(not torch.equal(tensor, tensors[0]) for tensor in tensors):
                    problems.append(f"different values: {', '.join(found)}")
                elif tensors[0].shape != (width,) or not tensors[0].isfinite().all():
                    problems.append(f"not {width} finite numbers: {', '.join(found)}: {tensors[0].tolist()}")
                else:
                    values[statistic] = tensors[0].tolist()
            if len(values) == len(names):
                try:
                    result[name] = of_mode(self.modes[name], values)
                except ValueError as error:
                    problems.append(f"{feature}: {error}")
        if problems:
            robots = sorted({what[0] for what in statistic_of.values() if what and what[0]})
            raise ValueError(
                f"{self.name}: cannot map the statistics of {robot or 'its only robot'}:\n  "
                + "\n  ".join(problems)
                + "\nfound:\n  "
                + ("\n  ".join(sorted(self.statistics)) or "none")
                + (f"\nof the robots {', '.join(robots)}: the import takes one by --robot" if robots else "")
                + "\ntraining from it with --init-from takes, unless told otherwise, the statistics of your data"
            )
        return result


@dataclass(frozen=True)
class Described:
    """What is read of LeRobot's config.json beside features and modes. LeRobot takes null for a number."""

    vlm_model_name: str
    chunk_size: ranges.Few
    n_action_steps: ranges.Few
    num_steps: ranges.Few
    tokenizer_max_length: ranges.Few
    max_state_dim: ranges.Size
    max_action_dim: ranges.Size
    min_period: ranges.Positive
    max_period: ranges.Positive
    expert_width_multiplier: ranges.Positive
    empty_cameras: ranges.CountOrNone
    num_vlm_layers: int  # below 1: all
    num_expert_layers: int
    self_attn_every_n_layers: int


def load_checkpoint(name: str) -> Checkpoint:
    """Read a LeRobot SmolVLA policy from a directory or, if there is none of this name, from the hub.

    Raises ValueError, listing everything in it that has no counterpart here.
    """
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

    directory = find_directory("SmolVLA checkpoint", name, (CONFIG_NAME, WEIGHTS_NAME))
    if (kind := read_json(directory / CONFIG_NAME).get("type")) != SmolVLAConfig.get_choice_name(SmolVLAConfig):
        raise ValueError(f"{name} holds a policy of type {kind}, expected smolvla")
    with refusing(f"{name}: the installed LeRobot does not read its {CONFIG_NAME}"):  # such as an unknown field
        config = PreTrainedConfig.from_pretrained(directory)
        config.validate_features()  # adds the optional cameras
    decode_known(Described, vars(config), f"{directory / CONFIG_NAME}")
    steps, statistics = _read_processors(directory)
    if problems := _unmappable(config, steps):
        raise ValueError(f"{name} is a SmolVLA that has no counterpart here:\n  " + "\n  ".join(problems))

    # torch.compile puts _orig_mod into names.
    tensors = {key.replace("._orig_mod", ""): t for key, t in read_weights(directory / WEIGHTS_NAME).items()}
    buffers = {key for key in tensors if NORMALIZATION_BUFFER.match(key)}
    statistics |= {f"{WEIGHTS_NAME}: {key}": tensors[key] for key in buffers}
    try:
        vlm = load_trunk_config(config.vlm_model_name, None)
        tokenizer = load_trunk_tokenizer(config.vlm_model_name, None)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: its vlm_model_name in {CONFIG_NAME} cannot be loaded: {error}") from error
    trunk_dtypes = {tensor.dtype for key, tensor in tensors.items() if key.startswith(TRUNK)}
    core = core_config(config, vlm, tokenizer)
    core = replace(core, torch_dtype="bfloat16" if trunk_dtypes == {torch.bfloat16} else "float32")
    unread = {key for key in tensors if is_unread(key, core.num_trunk_layers)}
    with refusing(f"{name}: its {CONFIG_NAME} describes a model that cannot be built"), torch.device("meta"):
        state = SmolVLASharedCore(core).state_dict()
    found = {key: tensor for key, tensor in tensors.items() if key not in buffers | unread}
    check_weights(name, {theirs: state[ours] for ours, theirs in lerobot_names(state).items()}, found)
    return Checkpoint(
        name=name,
        core=core,
        weights={ours: found[theirs] for ours, theirs in lerobot_names(state).items()},
        unread=tuple(sorted(unread)),
        tokenizer=tokenizer,
        modes={name: config.normalization_mapping[name.upper()].value.lower() for name in FEATURES},
        statistics=statistics,
        image_shapes={key: feature.shape for key, feature in config.image_features.items()},
        optional_cameras=tuple(key for key in config.image_features if key.startswith(EMPTY_CAMERA)),
        rename_map=steps.get("rename_observations_processor", {}).get("rename_map", {}),
        n_action_steps=config.n_action_steps,
    )


def _read_processors(directory: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Configurations of the processors' steps by name, and their statistics; both empty in old checkpoints."""
    steps, statistics = {}, {}
    for processor in PROCESSORS:
        path = directory / f"{processor}.json"
        if not path.is_file():
            continue
        for step in read_steps(path):
            steps[step["registry_name"]] = step["config"]
            if file := step.get("state_file"):
                statistics |= {f"{file}: {key}": tensor for key, tensor in read_weights(directory / file).items()}
    return steps, statistics


def _unmappable(config: "SmolVLAConfig", steps: dict[str, dict[str, Any]]) -> list[str]:
    """What has no counterpart here, in words."""
    normalization = {kind: mode.value for kind, mode in config.normalization_mapping.items()}
    tokenizer = {"tokenizer_name": config.vlm_model_name, "max_length": config.tokenizer_max_length}
    required = {  # by step; None: config.json
        None: {
            "n_obs_steps": 1,
            "attention_mode": "cross_attn",
            "adapt_to_pi_aloha": False,
            "use_peft": False,
        },
        "rename_observations_processor": {},
        "to_batch_processor": {},
        "smolvla_new_line_processor": {},
        "tokenizer_processor": tokenizer,
        "device_processor": {},
        "normalizer_processor": {"norm_map": normalization},
        "unnormalizer_processor": {"norm_map": normalization},
    }
    found = {None: vars(config), **steps}
    problems = [f"processor step {step}: unknown" for step in found if step not in required]
    problems += [
        f"{step or CONFIG_NAME}: {field} is {found[step].get(field)}, here it is always {value}"
        for step in found.keys() & required.keys()
        for field, value in required[step].items()
        if found[step].get(field) != value
    ]
    modes = [mode.upper() for mode in KINDS]
    of_vectors = {normalization.get(kind) for kind in ("STATE", "ACTION")}
    if normalization.get("VISUAL") != "IDENTITY" or not of_vectors <= {*modes}:
        problems.append(
            f"{CONFIG_NAME}: normalization_mapping is {normalization}, here VISUAL is IDENTITY, STATE and ACTION are "
            + " or ".join(modes)
        )
    size, layers = config.resize_imgs_with_padding, config.num_vlm_layers
    if size[0] != size[1]:
        problems.append(f"resize_imgs_with_padding is {size}, images here are padded to a square")
    if config.num_expert_layers > 0 and config.num_expert_layers != layers:
        problems.append(
            f"num_expert_layers is {config.num_expert_layers}, here there are as many as the trunk's: {layers}"
        )
    if config.self_attn_every_n_layers < 1:
        problems.append(f"self_attn_every_n_layers is {config.self_attn_every_n_layers}, here it is at least 1")
    if not (config.image_features and config.robot_state_feature and config.action_feature):
        problems.append(f"it needs cameras, a state and an action: {config.input_features} -> {config.output_features}")
    return problems


def core_config(config: "SmolVLAConfig", vlm: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> CoreConfig:
    """Our configuration of a mappable SmolVLA."""
    special = (tokenizer.fake_image_token_id, tokenizer.global_image_token_id)
    num_layers = vlm["text_config"]["num_hidden_layers"]
    return CoreConfig(
        model_name=config.vlm_model_name,
        model_revision=None,
        vlm=vlm,
        cameras=tuple(config.image_features),
        image_size=config.resize_imgs_with_padding[0],
        num_trunk_layers=min(config.num_vlm_layers, num_layers) if config.num_vlm_layers > 0 else num_layers,
        image_special_tokens=special if config.add_image_special_tokens else (),
        state_dim=config.robot_state_feature.shape[0] if config.robot_state_feature else 0,
        action_dim=config.action_feature.shape[0],
        noisy_padding=True,
        **{ours: getattr(config, theirs) for ours, theirs in LEROBOT_OPTION.items()},
    )


# --- writing ----------------------------------------------------------------------------------------------------------


def save_checkpoint(directory: Path, policy: SavedPolicy) -> None:
    """Write a policy as a LeRobot SmolVLA policy with its processors.

    LeRobot reads the trunk's configuration and tokenizer from where the core's trunk came from. LeRobot keeps but never
    uses the trunk's final norm and output layer: they become ones and the token embedding.
    Raises ValueError for what LeRobot's SmolVLA cannot express.
    """
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors

    ours, optional_cameras = policy.config.core, policy.config.optional_cameras
    numbered = tuple(f"{EMPTY_CAMERA}{index}" for index in range(len(optional_cameras)))
    problems = [] if ours.state_dim else ["a policy without a state"]
    problems += ["relative actions"] if policy.config.relative_actions else []
    if set(optional_cameras) != set(numbered):
        problems.append(f"optional cameras of other names than {EMPTY_CAMERA}<number>: {', '.join(optional_cameras)}")
    trunk_tokenizer = load_trunk_tokenizer(ours.model_name, ours.model_revision)
    if pack_tokenizer(trunk_tokenizer) != pack_tokenizer(policy.tokenizer):
        problems.append(f"another tokenizer than that of {ours.model_name}")
    shapes = {key: feature.shape for key, feature in policy.config.image_features.items()}
    config = SmolVLAConfig(
        input_features=input_features(ours, shapes),
        output_features=output_features(ours),
        device=policy.config.device,
        push_to_hub=False,
        n_action_steps=policy.config.n_action_steps,
        resize_imgs_with_padding=(ours.image_size, ours.image_size),
        empty_cameras=len(optional_cameras),
        vlm_model_name=trunk_location(ours.model_name),
        normalization_mapping=policy.config.normalization_mapping,
        add_image_special_tokens=bool(ours.image_special_tokens),
        num_vlm_layers=ours.num_trunk_layers,
        **{theirs: getattr(ours, name) for name, theirs in LEROBOT_OPTION.items()},
    )
    # A field that LeRobot cannot express comes back with another value.
    back = asdict(core_config(config, ours.vlm, trunk_tokenizer))
    latent_head = {"latent_vector_dim", "code_seq_len", "codebook_size"}
    not_exported = {"model_name", "model_revision", "torch_dtype", "noisy_padding", *latent_head}
    problems += [
        f"{field} {value}, there it is always {back[field]}"
        for field, value in asdict(ours).items()
        if field not in not_exported and value != back[field]
    ]
    if problems:
        raise ValueError("LeRobot's SmolVLA cannot express:\n  " + "\n  ".join(problems))

    weights = {theirs: policy.weights[name] for name, theirs in lerobot_names(policy.weights).items()}
    if not ours.noisy_padding:  # LeRobot's padding always carries noise: with zero weights nothing reads it
        weights[IN_PROJ] = weights[IN_PROJ].clone()
        weights[IN_PROJ][:, ours.action_dim :] = 0
    weights[OUTPUT_LAYER] = (embedding := policy.weights[TOKEN_EMBEDDING]).clone()
    weights[FINAL_NORM] = torch.ones_like(embedding[0])
    write_weights(directory / WEIGHTS_NAME, weights)
    config.save_pretrained(directory)
    preprocessor, postprocessor = make_smolvla_pre_post_processors(config, policy.stats)
    preprocessor.steps[0].rename_map = policy.rename_map
    for processor in (preprocessor, postprocessor):
        processor.save_pretrained(directory)
