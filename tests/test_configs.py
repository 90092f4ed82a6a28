"""configs/accelerate/*.yaml: accelerate accepts them, and they name what the model has."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from transformers import AutoConfig

from smolvla_shared.config import CoreConfig
from smolvla_shared.model import SmolVLASharedCore

CONFIGS = Path(__file__).parent.parent / "configs" / "accelerate"


@pytest.mark.parametrize("name", ["cpu", "gpu_bf16", "ddp_8gpu", "fsdp2_8gpu", "multinode"])
def test_accelerate_accepts_our_configurations(name):
    path = str(CONFIGS / f"{name}.yaml")
    args = launch_command_parser().parse_args(["--config-file", path, "train_stage2.py"])
    config, args = load_config_from_file(path), _validate_launch_command(args)[0]
    assert args.num_processes == config.num_processes
    assert args.use_fsdp == (name in ("fsdp2_8gpu", "multinode"))


@pytest.mark.parametrize("name", ["fsdp2_8gpu", "multinode"])
def test_fsdp_wraps_classes_that_the_model_has(name, tiny_vlm):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml")).fsdp_config
    core = CoreConfig("tiny", None, AutoConfig.from_pretrained(tiny_vlm).to_dict(), ("camera",), image_size=64)
    classes = {type(module).__name__ for module in SmolVLASharedCore(core).modules()}
    assert set(config["fsdp_transformer_layer_cls_to_wrap"].split(",")) <= classes
