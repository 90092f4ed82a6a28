"""A SmolVLM in files: configuration, tokenizer and weights, from a hub id, a local directory or this package."""

import json
from contextlib import AbstractContextManager, nullcontext
from importlib import resources
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast, SmolVLMConfig, SmolVLMModel

from smolvla_shared.config import PRESETS, TINY, CoreConfig, ModelConfig
from smolvla_shared.files import hub_or_cache


def trunk_location(name: str) -> str:
    """What transformers can load: the packaged directory for `tiny`, otherwise the name itself.

    Raises ValueError for an absolute path without a config.json.
    """
    if name == TINY:
        return str(resources.files("smolvla_shared") / "assets" / "tiny_vlm")
    if Path(name).is_absolute() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"--model.name {name}: no such directory, or no config.json in it")
    return name


def asking_hub(location: str) -> AbstractContextManager[str]:
    """For what transformers loads: `hub_or_cache`, or nothing if the location is a directory. Yields what is wrong."""
    return nullcontext("") if Path(location).is_dir() else hub_or_cache()


def load_trunk_config(name: str, revision: str | None) -> dict[str, Any]:
    """CoreConfig.vlm of a SmolVLM, by hub id, local directory or `tiny`. Raises ValueError if there is no SmolVLM."""
    location = trunk_location(name)
    try:
        with asking_hub(location) as problem:
            vlm_config = AutoConfig.from_pretrained(location, revision=revision)
    except OSError as error:
        raise ValueError(
            f"--model.name {name}: neither a local directory with a config.json nor a model that the hub gave: "
            f"{problem or error}"
        ) from error
    if not isinstance(vlm_config, SmolVLMConfig):
        raise ValueError(f"--model.name {name} is a {vlm_config.model_type}, the trunk must be a smolvlm")
    fields = json.loads(vlm_config.to_json_string(use_diff=False))  # JSON types: equal to what a manifest gives back
    for part in (fields, fields["vision_config"], fields["text_config"]):
        part.pop("_name_or_path", None)  # this machine's path
    return fields


def load_trunk_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerFast:
    location = trunk_location(name)
    with asking_hub(location):
        return AutoTokenizer.from_pretrained(location, revision=revision)


def pack_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """One JSON text from which `unpack_tokenizer` rebuilds the tokenizer offline."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()  # the backend remembers the padding and truncation of the last call
    backend.no_truncation()
    return json.dumps({"tokenizer": json.loads(backend.to_str()), "pad_token": tokenizer.pad_token})


def unpack_tokenizer(packed: str) -> PreTrainedTokenizerFast:
    content = json.loads(packed)
    backend = Tokenizer.from_str(json.dumps(content["tokenizer"]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=content["pad_token"])


def load_trunk_weights(config: CoreConfig) -> dict[str, Tensor]:
    """A SmolVLM's pretrained weights, by their names in a core. Raises ValueError if weights are missing."""
    location = trunk_location(config.model_name)
    with asking_hub(location):
        vlm, report = SmolVLMModel.from_pretrained(location, revision=config.model_revision, output_loading_info=True)
    if report["missing_keys"]:  # transformers initialises them at random and goes on
        raise ValueError(
            f"--model.name {config.model_name}: the weights lack {', '.join(sorted(report['missing_keys']))}"
        )
    del vlm.text_model.norm  # as in Trunk, so are the layers
    vlm.text_model.layers = vlm.text_model.layers[: config.num_trunk_layers]
    return {f"trunk.vlm.{name}": tensor for name, tensor in vlm.state_dict().items()}


def make_core_config(model: ModelConfig, cameras: tuple[str, ...], **dims) -> CoreConfig:
    """The CoreConfig of the --model options. dims: CoreConfig's data-dependent fields (state_dim, ...)."""
    name = model.stated_name or PRESETS["smolvlm2-500m"]
    vlm = load_trunk_config(name, model.revision)
    return CoreConfig(
        model_name=name,
        model_revision=model.revision,
        vlm=vlm,
        cameras=cameras,
        image_size=vlm["vision_config"]["image_size"],
        num_trunk_layers=min(CoreConfig.num_trunk_layers, vlm["text_config"]["num_hidden_layers"]),
        **dims,
    )
