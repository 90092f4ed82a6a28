"""The parts of a core: which of them train, how their layers run, and how many parameters they have."""

import os
import shutil
import sys
import sysconfig
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from smolvla_shared.config import ACTION, LATENT, CoreConfig, ModelConfig
from smolvla_shared.model import SmolVLASharedCore

# What is frozen, counted and reported as one part, and the prefix of its parameters' names.
PARTS = {
    "vision tower": "trunk.vlm.vision_model.",
    "connector": "trunk.vlm.connector.",
    "language layers": "trunk.vlm.text_model.",
    "expert": "expert.",
    "state projection": "state_proj.",
    "latent head": "latent_head.",
    "action head": "action_head.",
}


def layers(core: SmolVLASharedCore) -> list[GradientCheckpointingLayer]:
    """The transformer layers of vision tower, trunk and expert: checkpointed, compiled and sharded one by one."""
    vlm = core.trunk.vlm
    return [*vlm.vision_model.encoder.layers, *vlm.text_model.layers, *core.expert.layers]


def configure_layers(core: SmolVLASharedCore, model: ModelConfig) -> None:
    """Checkpoint and compile every layer as the --model options say; parameters keep their names and values.

    Raises ValueError for what check_compilers misses.
    """
    if model.activation_checkpointing:
        for layer in layers(core):
            layer.gradient_checkpointing = True
            # Without dropout there is no random state to keep.
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if model.compile:
        check_compilers()
        compile_layers(core)


def compile_layers(core: SmolVLASharedCore, **options: Any) -> None:
    """Compile every layer, for all sizes of batch, text and head at once.

    Layers of a kind share their variants: with and without gradients, and for a batch of 1. Those of the expert, of two
    kinds and one class, may be more than the 8 after which PyTorch runs uncompiled. The trunk's last layer stays as it
    is: only two projections of it are used. options: for torch.compile
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    torch.fx.experimental._config.use_duck_shape = False  # sizes that happen to be equal are not taken to be the same
    last = core.trunk.vlm.text_model.layers[-1]
    for layer in layers(core):
        if layer is not last:
            layer.compile(dynamic=True, **options)


def check_compilers() -> None:
    """Raise ValueError, with the fix, if torch.compile would miss something at the first step."""
    headers = Path(sysconfig.get_path("include"))
    missing = []
    if not shutil.which(cxx := os.environ.get("CXX", "g++")):
        missing.append(f"a C++ compiler, there is no {cxx} (apt-get install g++, or name yours in CXX)")
    if not (headers / "Python.h").is_file():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        missing.append(f"Python's headers, there is no {headers / 'Python.h'} (apt-get install {package})")
    # On a GPU Triton compiles the functions that start its kernels.
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if torch.cuda.is_available() and not any(map(shutil.which, names)):
        missing.append("a C compiler (apt-get install gcc, or name yours in CC)")
    if missing:
        options = "--model.compile (in LeRobot --policy.compile_model)"
        raise ValueError(
            f"--model.compile needs {' and '.join(missing)}; or leave {options} out. A saved policy "
            "that has it on has compile_model in its config.json: set it to false there, and remove manifest.json"
        )


def parameters_by_part(core: SmolVLASharedCore) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of each part that this core has: {part: {name: parameter}}."""
    named = dict(core.named_parameters())
    parts = {part: {n: p for n, p in named.items() if n.startswith(prefix)} for part, prefix in PARTS.items()}
    assert sum(len(parameters) for parameters in parts.values()) == len(named)
    return {part: parameters for part, parameters in parts.items() if parameters}


def freeze(core: SmolVLASharedCore, parts: list[str]) -> None:
    """Switch off the gradients of these parts. Raises ValueError for a part that this core does not have."""
    by_part = parameters_by_part(core)
    for part in parts:
        if part not in by_part:
            raise ValueError(f"cannot freeze {part!r}: this model has {', '.join(by_part)}")
        for parameter in by_part[part].values():
            parameter.requires_grad_(False)


def frozen_parts(model: ModelConfig, core: CoreConfig, targets: Collection[str]) -> list[str]:
    """The parts that do not train: those that --model.freeze-* freezes, and heads without a target."""
    freeze_trunk = core.has_pretrained_trunk if model.freeze_trunk is None else model.freeze_trunk
    freeze_vision = core.has_pretrained_trunk if model.freeze_vision is None else model.freeze_vision
    parts = ["vision tower", "connector"] if freeze_vision or freeze_trunk else []
    parts += ["language layers"] if freeze_trunk else []
    parts += ["state projection"] if model.freeze_state_projection else []
    heads = {LATENT: core.latent_vector_dim, ACTION: core.action_dim}
    return parts + [f"{name} head" for name, width in heads.items() if width and name not in targets]


def prepare_to_train(core: SmolVLASharedCore, model: ModelConfig, targets: Collection[str]) -> None:
    """Freeze, checkpoint and compile as the --model options say, for training on these targets."""
    freeze(core, frozen_parts(model, core.config, targets))
    configure_layers(core, model)


def parameter_table(core: SmolVLASharedCore) -> str:
    """Trained and frozen parameters of each part, for the first lines of a run."""
    rows = [f"{'parameters':<18}{'trained':>14}{'frozen':>14}"]
    total = [0, 0]
    for part, parameters in parameters_by_part(core).items():
        trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
        frozen = sum(p.numel() for p in parameters.values()) - trained
        total = [total[0] + trained, total[1] + frozen]
        rows.append(f"{part:<18}{trained:>14,}{frozen:>14,}")
    return "\n".join([*rows, f"{'total':<18}{total[0]:>14,}{total[1]:>14,}"])
