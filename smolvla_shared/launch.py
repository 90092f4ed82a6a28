"""What a command is told by its environment, which `accelerate launch` sets from its configuration file.

Nothing heavy is imported: what does not fit is refused when the options are parsed.
"""

import os
from dataclasses import fields
from typing import Any

IN_WORDS = {"no": "float32", "bf16": "bfloat16"}
# What Accelerate takes from its environment, and would do beside what these runs do: what it may be, and what to pass.
SETTINGS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "--accumulation-steps"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "--model.compile"),
    "ACCELERATE_USE_DEEPSPEED": ("false", "configs/accelerate/fsdp2_8gpu.yaml"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "configs/accelerate/fsdp2_8gpu.yaml"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", "configs/accelerate/fsdp2_8gpu.yaml"),
}


def refuse_settings() -> None:
    """Raise ValueError for settings of Accelerate that change a run without its options."""
    for name, (expected, instead) in SETTINGS.items():
        if os.environ.get(name, expected).lower() != expected:
            raise ValueError(
                f"{name} is {os.environ[name]}, by the Accelerate configuration or the environment, where these runs "
                f"need {expected}: take it out, and pass {instead}"
            )


def stated_precision(option: str | None) -> tuple[str, str]:
    """The precision of a run, "no" (float32) or "bf16", and who stated it.

    option: --precision; None: not given

    Raises ValueError if the Accelerate configuration asks for bf16 and --precision for float32, or if the former asks
    for anything else. Its "no" is no contradiction: `accelerate launch` also says "no" where nobody has said anything.
    """
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if configured not in (None, *IN_WORDS):
        raise ValueError(
            f"the Accelerate configuration asks for mixed_precision {configured}, but runs compute in float32 (no) or "
            "bf16: change it there, or pass --mixed_precision bf16 to accelerate launch"
        )
    if (option, configured) == ("no", "bf16"):
        raise ValueError(
            "--precision no, but the Accelerate configuration asks for mixed_precision bf16: leave --precision out, or "
            "pass --mixed_precision no to accelerate launch"
        )
    if option:
        return option, "--precision"
    return (configured, "the Accelerate configuration") if configured else ("no", "the default")


def check(config: Any) -> None:
    """Raise ValueError for an environment that contradicts the options of a command that uses Accelerate: they name a
    run, or labels to write.
    """
    if {"run_dir", "label_cache"} & {field.name for field in fields(config)}:
        refuse_settings()
        stated_precision(getattr(config, "precision", None))  # labels are computed in that of the configuration
