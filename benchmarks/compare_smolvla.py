"""Time and memory of our model and LeRobot's SmolVLA: the same weights in one process, by turns.

python benchmarks/compare_smolvla.py           # the 500M shape, about 20 minutes on two calm cores
python benchmarks/compare_smolvla.py --quick   # a tiny shape, a minute: does it run? Its times say nothing

Weights are random and nothing is downloaded. Before anything is timed, both models must give the same loss. A time is
a median over --repeats rounds, each of which runs every candidate once.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from memory import TRUNKS  # beside this file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from smolvla_shared.batch import Batch, FlowTarget
from smolvla_shared.config import ACTION, LATENT, TINY, ModelConfig, OptimConfig
from smolvla_shared.feature_cache import token_shape
from smolvla_shared.flow import training_time
from smolvla_shared.lerobot_policy import to_batch
from smolvla_shared.lerobot_smolvla_files import lerobot_names
from smolvla_shared.losses import masked_mean
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.model_parts import configure_layers, freeze, frozen_parts
from smolvla_shared.preprocess import pad_width
from smolvla_shared.run_optimizer import clip_gradients, make_optimizer
from smolvla_shared.trunk import Prefix
from smolvla_shared.trunk_files import make_core_config, trunk_location

# HuggingFaceTB/SmolVLM2-500M-Video-Instruct with the 16 of its 32 language layers that SmolVLA keeps.
SHAPE = TRUNKS["SmolVLM2-500M"]
SMOLVLM2_500M: dict[str, Any] = SHAPE | {
    "model_type": "smolvlm",
    "architectures": ["SmolVLMForConditionalGeneration"],
    "dtype": "float32",
    "image_token_id": 49190,
    "tie_word_embeddings": False,
    "text_config": SHAPE["text_config"]
    | {
        "dtype": "float32",
        "num_hidden_layers": 16,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
    },
    "vision_config": SHAPE["vision_config"] | {"model_type": "smolvlm_vision", "dtype": "float32"},
}
LEROBOT_PARAMETERS = 450_046_176  # in lerobot/smolvla_base
CAMERA, STATE_DIM, ACTION_DIM, TEXT_TOKENS = "observation.images.top", 6, 6, 12
CODE_SEQ_LEN, LATENT_DIM = 4, 32  # LAPA's released teacher


@dataclass(frozen=True)
class Options:
    """Time and memory of training and inference, ours beside LeRobot's SmolVLA."""

    # A tiny shape instead of the 500M one, and two rounds.
    quick: bool = False
    # Rounds per median.
    repeats: int = 5
    # Threads of PyTorch's operators.
    threads: int = os.cpu_count() or 1
    # JSON file for all figures.
    out: Path | None = None
    # Internal: only print the memory of a training step of this model. The benchmark starts itself with --memory-*.
    memory_of: Literal["ours", "lerobot"] | None = None
    memory_batch_size: int = 4
    memory_checkpointing: bool = False
    memory_cached: bool = False


# --- the two models ---------------------------------------------------------------------------------------------------


def write_trunk(directory: Path, quick: bool) -> None:
    """Make a directory that both models load as a SmolVLM: configuration, tokenizer and processor, no weights."""
    shutil.copytree(trunk_location(TINY), directory, dirs_exist_ok=True)
    if not quick:
        (directory / "config.json").write_text(json.dumps(SMOLVLM2_500M))


def make_lerobot(trunk: Path) -> SmolVLAPolicy:
    side = json.loads((trunk / "config.json").read_text())["vision_config"]["image_size"]
    config = SmolVLAConfig(
        vlm_model_name=str(trunk),
        load_vlm_weights=False,
        resize_imgs_with_padding=(side, side),
        input_features={
            CAMERA: PolicyFeature(FeatureType.VISUAL, (3, side, side)),
            "observation.state": PolicyFeature(FeatureType.STATE, (STATE_DIM,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
        device="cpu",
    )
    return SmolVLAPolicy(config).train()


def make_ours(trunk: Path, checkpointing: bool = False) -> SmolVLASharedCore:
    """A core with both heads. The trunk is frozen; expert, heads and state projection train."""
    model = ModelConfig(name=str(trunk), activation_checkpointing=checkpointing)
    core = SmolVLASharedCore(
        make_core_config(
            model,
            (CAMERA,),
            state_dim=STATE_DIM,
            action_dim=ACTION_DIM,
            latent_vector_dim=CODE_SEQ_LEN * LATENT_DIM,
            code_seq_len=CODE_SEQ_LEN,
            noisy_padding=True,
        )
    )
    freeze(core, frozen_parts(model, core.config, [ACTION, LATENT]))
    configure_layers(core, model)
    return core.train()


def copy_weights(core: SmolVLASharedCore, policy: SmolVLAPolicy) -> None:
    """Give our core LeRobot's weights."""
    ours, theirs = core.state_dict(), policy.state_dict()
    core.load_state_dict(ours | {name: theirs[their_name] for name, their_name in lerobot_names(ours).items()})


def observe(batch_size: int, side: int) -> dict[str, Tensor]:
    """A preprocessed LeRobot batch of random values."""
    generator = torch.Generator().manual_seed(0)
    return {
        CAMERA: torch.rand(batch_size, 3, side, side, generator=generator),
        "observation.state": torch.randn(batch_size, STATE_DIM, generator=generator),
        "observation.language.tokens": torch.randint(5, 1000, (batch_size, TEXT_TOKENS), generator=generator),
        "observation.language.attention_mask": torch.ones(batch_size, TEXT_TOKENS, dtype=torch.bool),
        "action": torch.randn(batch_size, 50, ACTION_DIM, generator=generator),
        "action_is_pad": torch.zeros(batch_size, 50, dtype=torch.bool),
    }


def draw(core: SmolVLASharedCore, name: str, batch_size: int, num_draws: int) -> tuple[Tensor, Tensor]:
    """Noise [B, K, T, A] and times [B, K] of a head."""
    generator = torch.Generator().manual_seed(1)
    head = core.head(name)
    noise = torch.randn(batch_size, num_draws, head.num_tokens, head.token_dim, generator=generator)
    return noise, training_time(torch.rand(batch_size, num_draws, generator=generator))


def our_batch(
    core: SmolVLASharedCore,
    observation: dict[str, Tensor],
    num_draws: int = 1,
    heads: tuple[str, ...] = (ACTION,),
    cached: bool = False,
) -> Batch:
    """The observation as our core's Batch, with targets for these heads. cached: random image tokens, as from a feature
    cache, replace the images.
    """
    batch, size = to_batch(observation, core.config), len(observation["action"])
    if cached:
        batch.images = torch.randn(size, 1, *token_shape(core)).bfloat16()
    values = {
        ACTION: pad_width(observation["action"], core.config.max_action_dim),
        LATENT: torch.ones(size, CODE_SEQ_LEN, LATENT_DIM),
    }
    for name in heads:
        mask = torch.ones(values[name].shape[:2], dtype=torch.bool)
        batch.targets[name] = FlowTarget(values[name], mask, *draw(core, name, size, num_draws))
    return batch


def our_loss(core: SmolVLASharedCore, batch: Batch) -> Tensor:
    return sum(masked_mean(errors, batch.masks[name]) for name, errors in core(batch).items())


class Trainer:
    """Backward, clipping and update of a training step, with LeRobot's optimizer or that of our loop."""

    def __init__(self, module: nn.Module, optimizer: Literal["ours", "lerobot"]):
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if optimizer == "lerobot":
            preset = SmolVLAConfig().get_optimizer_preset()
            self.optimizer = preset.build(self.parameters)
            self.clip = partial(torch.nn.utils.clip_grad_norm_, self.parameters, preset.grad_clip_norm)
        else:
            self.optimizer = make_optimizer(self.parameters, OptimConfig())
            self.clip = partial(clip_gradients, self.optimizer, self.parameters, OptimConfig.max_grad_norm)

    def step(self, loss: Tensor) -> None:
        loss.backward()
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()


# --- measuring --------------------------------------------------------------------------------------------------------


def medians(candidates: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each candidate. They run by turns, so that other load on the machine falls on all of them; the
    first round is warm-up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(1 + repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def gflop(run: Callable[[], Any]) -> float:
    """Billions of operations: two per multiply-add."""
    # PyTorch's counter does not know the CPU's attention.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    count = {attention: lambda query, key, *_, **__: 4 * math.prod(query) * key[2]}  # of shapes [B, heads, tokens, d]
    with FlopCounterMode(display=False, custom_mapping=count) as counter:
        run()
    return counter.get_total_flops() / 1e9


def resident(field: str) -> float:
    """This process's memory, GB. field: VmRSS, now; VmHWM, the peak since the last reset"""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024 / 1e9


def measure_memory(options: Options) -> dict[str, float]:
    """GB at the peak of the second training step, and between the steps (weights, gradients, optimizer), both without
    the memory in use before the model was built.
    """
    imports = resident("VmRSS")
    with tempfile.TemporaryDirectory() as directory:
        write_trunk(Path(directory), options.quick)
        if options.memory_of == "lerobot":
            model = make_lerobot(Path(directory))
            side = model.config.resize_imgs_with_padding[0]
        else:
            model = make_ours(Path(directory), options.memory_checkpointing)
            side = model.config.image_size
    # Training from a feature cache, there are no images in memory.
    observation = observe(options.memory_batch_size, 1 if options.memory_cached else side)
    trainer = Trainer(model, options.memory_of)

    def step() -> None:
        if options.memory_of == "lerobot":
            trainer.step(model(observation)[0])
        else:
            trainer.step(our_loss(model, our_batch(model, observation, cached=options.memory_cached)))

    step()
    between = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    step()
    return {"peak": resident("VmHWM") - imports, "between steps": between - imports}


def child_memory(options: Options, memory_of: str, batch_size: int, *flags: str) -> dict[str, float]:
    """measure_memory in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", memory_of, "--memory-batch-size", str(batch_size)]
    command += ["--threads", str(options.threads), *["--quick"] * options.quick, *flags]
    # Large blocks are returned to the system when they are freed, so that the system counts only memory in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    what: str
    lerobot: float | None
    ours: float
    unit: str
    against: float | None = None  # what `ours` is compared with; None: LeRobot
    goal: float | None = None  # the largest ratio that was aimed at

    @property
    def ratio(self) -> float:
        return self.ours / (self.against or self.lerobot)

    def __str__(self) -> str:
        theirs = f"{self.lerobot:10.3f}" if self.lerobot else f"{'':>10}"
        verdict = "" if self.goal is None else f"<= {self.goal:.2f} " + ("yes" if self.ratio <= self.goal else "NO")
        return f"{self.what:<58}{theirs}{self.ours:10.3f} {self.unit:<3}{self.ratio:8.3f}  {verdict}"


@dataclass(frozen=True)
class Models:
    """Both models, with equal weights."""

    policy: SmolVLAPolicy
    core: SmolVLASharedCore

    @property
    def side(self) -> int:
        return self.core.config.image_size


def make_models(options: Options) -> Models:
    """Both models. Stops the benchmark unless they give the same loss."""
    with tempfile.TemporaryDirectory() as directory:
        write_trunk(Path(directory), options.quick)
        models = Models(make_lerobot(Path(directory)), make_ours(Path(directory)))
    copy_weights(models.core, models.policy)
    theirs, ours = (sum(p.numel() for p in model.parameters()) for model in (models.policy, models.core))
    assert options.quick or theirs == LEROBOT_PARAMETERS, theirs
    print(
        f"{theirs:,} parameters in LeRobot's model; {ours:,} in ours, which has a latent head, but neither the output "
        "layer nor the final norm of the trunk, which no action depends on"
    )
    observation, (noise, times) = observe(2, models.side), draw(models.core, ACTION, 2, 1)
    with torch.no_grad():
        loss = models.policy(observation, noise=noise[:, 0], time=times[:, 0])[0].item()
        our = our_loss(models.core, our_batch(models.core, observation)).item()
    print(f"loss with the same noise and times: {loss:.6f} and {our:.6f}")
    if abs(our / loss - 1) > 1e-5:
        raise SystemExit("the two models are not equal: there is nothing to compare")
    return models


def training_rows(models: Models, options: Options) -> Iterator[Row]:
    theirs, ours = Trainer(models.policy, "lerobot"), Trainer(models.core, "ours")
    ours_as_theirs = Trainer(models.core, "lerobot")
    for size in (1, 4):
        observation = observe(size, models.side)

        def train_theirs(observation=observation) -> None:
            theirs.step(models.policy(observation)[0])

        def train_ours(trainer: Trainer = ours, observation=observation, **kwargs: Any) -> None:
            trainer.step(our_loss(models.core, our_batch(models.core, observation, **kwargs)))

        candidates = {"lerobot": train_theirs, "ours": train_ours, "cached": partial(train_ours, cached=True)}
        candidates["same optimizer"] = partial(train_ours, ours_as_theirs)
        if size == 4:
            candidates |= {str(k): partial(train_ours, num_draws=k) for k in (2, 4, 8)}
            candidates["4, cached"] = partial(train_ours, num_draws=4, cached=True)
            candidates["both heads"] = partial(train_ours, heads=(ACTION, LATENT))
        seconds = medians(candidates, options.repeats)
        yield Row(f"training step, frozen trunk, B = {size}", seconds["lerobot"], seconds["ours"], "s", goal=0.80)
        yield Row("  with LeRobot's optimizer in both", seconds["lerobot"], seconds["same optimizer"], "s")
        goal = {1: 0.25, 4: 0.18}[size]
        yield Row("  with the feature cache", seconds["lerobot"], seconds["cached"], "s", goal=goal)
        if size == 4:
            for k in (1, 2, 4, 8):
                draw_s = seconds[str(k) if k > 1 else "ours"] / k
                yield Row(f"  a draw of it with {k} flow draws", seconds["lerobot"], draw_s, "s")
            draw_s = seconds["4, cached"] / 4
            yield Row("  a draw of it with 4 and the cache", seconds["lerobot"], draw_s, "s", goal=0.12)
            yield Row(
                "  co-training both heads; against ours on actions alone",
                None,
                seconds["both heads"],
                "s",
                against=seconds["ours"],
                goal=1.10,
            )


def latency_rows(models: Models, options: Options) -> Iterator[Row]:
    observation, noise = observe(1, models.side), draw(models.core, ACTION, 1, 1)[0][:, 0]
    for steps in (10, 5):

        def theirs(steps: int = steps) -> None:
            models.policy.config.num_steps = steps
            models.policy.predict_action_chunk(observation, noise=noise)

        def ours(steps: int = steps) -> None:
            models.core.sample(to_batch(observation, models.core.config), ACTION, noise, steps)

        seconds = medians({"lerobot": theirs, "ours": ours}, options.repeats)
        yield Row(f"action chunk, B = 1, {steps} Euler steps", seconds["lerobot"], seconds["ours"], "s", goal=0.80)


def memory_rows(options: Options) -> Iterator[Row]:
    theirs, ours = (child_memory(options, name, 4)["peak"] for name in ("lerobot", "ours"))
    yield Row("peak memory of a training step, B = 4", theirs, ours, "GB", goal=1.00)
    size = 64  # as in SmolVLA's paper; in a small batch weights and optimizer dominate
    plain, checkpointed = (
        child_memory(options, "ours", size, "--memory-cached", *flag) for flag in ([], ["--memory-checkpointing"])
    )
    what = f"  ours with checkpointing, feature cache, B = {size}; against without"
    yield Row(what, None, checkpointed["peak"], "GB", against=plain["peak"], goal=0.60)
    kept = [memory["peak"] - memory["between steps"] for memory in (plain, checkpointed)]
    yield Row("    of it activations", None, kept[1], "GB", against=kept[0])


def break_down(models: Models, options: Options) -> str:
    """Speed of each part's forward pass in training, beside the machine's speed in plain matrix products."""
    core = models.core
    batch, cached = (our_batch(core, observe(1, models.side), cached=flag) for flag in (False, True))
    prefix, target = core.encode(batch), batch.targets[ACTION]
    tokens, square = core.action_head.embed(target.noise, target.time), torch.randn(2048, 2048)
    product = "matrix product, 2048 x 2048"
    parts = {
        product: lambda: square @ square,
        "vision tower and connector, an image": lambda: core.trunk.embed_images(batch.images),
        "prefix, from image tokens": lambda: core.encode(cached),
        "expert, a draw": lambda: core.expert(tokens, Prefix(prefix.keys_values, prefix.mask)),
    }
    seconds = medians(parts, options.repeats)
    work = {name: gflop(run) for name, run in parts.items()}
    lines = [f"{'forward, B = 1':<40}{'GFLOP':>8}{'s':>8}{'GFLOP/s':>10}{'of the matrix product':>24}"]
    for name, amount in work.items():
        rate = amount / seconds[name]
        share = rate * seconds[product] / work[product]
        lines.append(f"{name:<40}{amount:8.1f}{seconds[name]:8.3f}{rate:10.1f}{share:24.0%}")
    return "\n".join(lines)


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.memory_of:
        print(json.dumps(measure_memory(options)))
        return
    load = os.getloadavg()[0]
    print(f"torch {torch.__version__}, {options.threads} threads; load before the start {load:.1f}")
    start, rows = time.perf_counter(), []
    models = make_models(options)
    print(f"\n{'':<58}{'LeRobot':>10}{'ours':>10} {'':<3}{'ratio':>8}  goal")
    for row in chain(training_rows(models, options), latency_rows(models, options), memory_rows(options)):
        rows.append(vars(row) | {"ratio": row.ratio})
        print(row, flush=True)
    breakdown = break_down(models, options)
    print(f"\n{breakdown}\n\n{(time.perf_counter() - start) / 60:.1f} minutes")
    if options.out:
        options.out.write_text(json.dumps({"rows": rows, "breakdown": breakdown.splitlines()}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
