"""A SmolVLM in files: configuration, tokenizer and weights, from a hub id, a local directory or this package."""

import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, SmolVLMConfig, SmolVLMModel

from smolvla_shared.command import of_machine
from smolvla_shared.config import PRESETS, TINY, CoreConfig, ModelConfig
from smolvla_shared.files import hub_or_cache, in_a_line
from smolvla_shared.refusals import read_json

CONFIG_NAME = "config.json"


def trunk_location(name: str) -> str:
    """What transformers can load: the packaged directory for `tiny`, otherwise the name itself.

    Raises ValueError for an absolute path without a config.json.
    """
    if name == TINY:
        return str(resources.files("smolvla_shared") / "assets" / "tiny_vlm")
    if Path(name).is_absolute() and not (Path(name) / CONFIG_NAME).is_file():
        raise ValueError(f"--model.name {name}: no such directory, or no config.json in it")
    return name


def asking_hub(location: str) -> AbstractContextManager[str]:
    """For what transformers loads: `hub_or_cache`, or nothing if the location is a directory. Yields what is wrong."""
    return nullcontext("") if Path(location).is_dir() else hub_or_cache()


@contextmanager
def loading(name: str, what: str) -> Iterator[str]:
    """Within this context transformers loads `what` of a trunk, from the location that this yields.

    Raises ValueError for all that transformers and its libraries raise over a file, of many kinds, and if the hub gives
    none.
    """
    location = trunk_location(name)
    with asking_hub(location) as problem:  # which refuses a proxy by itself
        try:
            yield location
        except Exception as error:
            if of_machine(error):
                raise
            if isinstance(error, OSError) and not Path(location).is_dir():
                raise ValueError(
                    f"--model.name {name}: neither a local directory with a config.json nor a model that the hub gave: "
                    f"{problem or error}"
                ) from error
            raise ValueError(
                f"--model.name {name}: its {what} cannot be loaded: {in_a_line(error)}: copy the directory again, or "
                "name another trunk"
            ) from error


def load_trunk_config(name: str, revision: str | None) -> dict[str, Any]:
    """CoreConfig.vlm of a SmolVLM, by hub id, local directory or `tiny`.

    Raises ValueError if there is no SmolVLM, or none can be built of its config.json.
    """
    if (file := Path(trunk_location(name)) / CONFIG_NAME).is_file():
        read_json(file)  # transformers tells less of a damaged one
    with loading(name, CONFIG_NAME) as location:
        vlm_config = AutoConfig.from_pretrained(location, revision=revision)
    if not isinstance(vlm_config, SmolVLMConfig):
        raise ValueError(f"--model.name {name} is a {vlm_config.model_type}, the trunk must be a smolvlm")
    if not isinstance(vlm_config.text_config, LlamaConfig):
        found = vlm_config.text_config.model_type
        raise ValueError(f"--model.name {name} has the language model {found}, that of a smolvlm is a llama")
    with loading(name, CONFIG_NAME), torch.device("meta"):
        # JSON types: equal to what a manifest gives back, of which every model is built.
        fields = json.loads(vlm_config.to_json_string(use_diff=False))
        SmolVLMModel(SmolVLMConfig.from_dict(fields))
    for part in (fields, fields["vision_config"], fields["text_config"]):
        part.pop("_name_or_path", None)  # this machine's path
    return fields


def load_trunk_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerFast:
    """Raises ValueError if there is none, or it lacks the token that fills up shorter texts."""
    with loading(name, "tokenizer") as location:
        tokenizer = AutoTokenizer.from_pretrained(location, revision=revision)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.pad_token is None:
        found = f"{type(tokenizer).__name__} with pad_token {tokenizer.pad_token}"
        raise ValueError(
            f"--model.name {name}: its tokenizer is a {found}, needed are a fast one (tokenizer.json) and its "
            "pad_token (tokenizer_config.json): copy both files of the trunk again"
        )
    return tokenizer


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
    """A SmolVLM's pretrained weights, by their names in a core.

    Raises ValueError if weights are missing, damaged, not finite, or of other shapes than config.json says.
    """
    options = {"revision": config.model_revision, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with loading(config.model_name, "weights") as location:
        vlm, report = SmolVLMModel.from_pretrained(location, **options)
    where = f"--model.name {config.model_name}: the weights"
    if report["missing_keys"]:  # transformers initialises them at random and goes on, and so those of another shape
        raise ValueError(f"{where} lack {', '.join(sorted(report['missing_keys']))}")
    if other := [f"{key} {[*found]} for {[*expected]}" for key, found, expected in sorted(report["mismatched_keys"])]:
        raise ValueError(f"{where} have other shapes than its {CONFIG_NAME}: {', '.join(other)}: copy both again")
    if more := [key for key in sorted(report["unexpected_keys"]) if re.search(r"\blayers\.\d+\.", key)]:
        raise ValueError(f"{where} have more layers than its {CONFIG_NAME}: {', '.join(more)}: copy both again")
    if broken := [key for key, tensor in vlm.state_dict().items() if not tensor.isfinite().all()]:
        raise ValueError(f"{where} are not finite: {', '.join(broken)}: copy them again")
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
