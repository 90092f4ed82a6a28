"""A GPU at the 500M shape: attention kernels, samples a second beside LeRobot's SmolVLA, memory beside the table.

What `python -m smolvla_shared.gpu_check` measures. Weights are random, and nothing is downloaded.
"""

import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from compare_smolvla import (
    Trainer,
    make_lerobot,
    make_ours,
    medians,
    observe,
    our_batch,
    our_loss,
    write_trunk,
)
from memory import TRUNK, TRUNKS, activation_bytes, make_batch, make_core, state_bytes, trunk_core_config
from memory import Options as MemoryOptions
from torch import Tensor
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

from smolvla_shared.batch import Batch, to_device
from smolvla_shared.config import ACTION, OptimConfig
from smolvla_shared.flow import episode_noise
from smolvla_shared.kernels import VisionMLP
from smolvla_shared.lerobot_files import load_config
from smolvla_shared.lerobot_policy import HLRPSmolVLASharedPolicy
from smolvla_shared.losses import masked_mean
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.model_parts import freeze
from smolvla_shared.run_optimizer import clip_gradients, make_optimizer


def bfloat16(device: torch.device, enabled: bool = True) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def big_core(device: torch.device, trains: str) -> tuple[SmolVLASharedCore, Batch]:
    """The 500M core with random weights, and the batch of the table in docs/scaling.md. trains: expert or all"""
    config = trunk_core_config("SmolVLM2-500M", cameras=2)
    with device:
        core = SmolVLASharedCore(config)
    freeze(core, TRUNK if trains == "expert" else [])
    return core, to_device(make_batch(config, MemoryOptions()), device)


def attention_kernels(core: SmolVLASharedCore, batch: Batch) -> dict[str, dict[str, int]]:
    """Which implementations of attention a forward pass calls, and how often, by precision."""
    found, prefix = {}, "aten::_scaled_dot_product_"
    for name, low in (("float32", False), ("bfloat16", True)):
        with torch.no_grad(), bfloat16(batch.text.device, low), torch.profiler.profile() as profiler:
            core(batch)
        called = [event.name for event in profiler.events() if event.name.startswith(prefix)]
        found[name] = dict(Counter(name.removeprefix(prefix) for name in called))
    return found


def sample(core: SmolVLASharedCore, device: torch.device, low: bool) -> Tensor:  # [B, T, A]
    """Action chunks of ten Euler steps from a fixed observation and noise, on the CPU. low: in bfloat16"""
    config, head, generator = core.config, core.head(ACTION), torch.Generator().manual_seed(0)
    shapes = (1, 3, config.image_size, config.image_size), (config.max_state_dim,), (head.num_tokens, head.token_dim)
    images, state, noise = (torch.randn(2, *shape, generator=generator) for shape in shapes)
    text, present = torch.arange(12).view(2, 6), torch.ones(2, 1, dtype=torch.bool)
    batch = Batch(images, present, text, text < 11, state, present[:, 0], targets={})
    with bfloat16(device, low):
        return core.to(device).sample(to_device(batch, device), ACTION, noise.to(device), 10).float().cpu()


def activation_apart(device: torch.device) -> float:
    """How far the MLP of a vision layer is from its own steps, one by one, as a share of them."""
    shape = TRUNKS["SmolVLM2-500M"]["vision_config"]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        mlp = VisionMLP(SmolVLMVisionConfig(**shape)).to(device)
        hidden = 3 * torch.randn(2, 64, shape["hidden_size"]).to(device)  # where kinds of GELU differ
        steps = mlp.fc2(mlp.activation_fn(mlp.fc1(hidden)))
        return ((mlp(hidden) - steps).norm() / steps.norm()).item()


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def compiled_sampler(directory: Path, device: torch.device) -> tuple[float, dict[str, float]]:
    """How far the chunk of a compiled policy is from the plain one's, as a share of it; and seconds of each: to load
    it, which compiles it, and of a chunk.
    """
    chunks, seconds = [], {}
    for name, compiles in (("plain", False), ("compiled", True)):
        config = replace(load_config(directory), device=str(device), compile_model=compiles)
        start = time.perf_counter()
        policy = HLRPSmolVLASharedPolicy.from_pretrained(directory, config=config)
        wait_for(device)
        seconds[f"{name}, load"] = time.perf_counter() - start
        shape = config.core.chunk_size, config.core.max_action_dim
        seen, noise = policy.blank_observation(), episode_noise(0, 0, shape)[None].to(device)

        def act(policy=policy, seen=seen, noise=noise) -> Tensor:
            chunk = policy.predict_action_chunk(seen, noise)
            wait_for(device)
            return chunk

        chunks.append(act())
        seconds |= medians({f"{name}, chunk": act}, repeats=5)
    return ((chunks[1] - chunks[0]).norm() / chunks[0].norm()).item(), seconds


def samples_a_second(device: torch.device, sizes: tuple[int, ...], quick: bool = False) -> dict[str, float]:
    """Training steps of both models with a frozen trunk and one camera, each as its own command computes in bfloat16:
    ours by autocast, LeRobot's with its VLM stored in bfloat16. quick: a tiny shape, whose figures say nothing
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        write_trunk(Path(directory), quick)
        policy, core = make_lerobot(Path(directory)), make_ours(Path(directory))
    policy.model.vlm_with_expert.vlm.to(torch.bfloat16)
    policy.to(device), core.to(device)
    theirs, ours = Trainer(policy, "lerobot"), Trainer(core, "ours")
    found = {}
    for size in sizes:
        observation = observe(size, core.config.image_size)
        batch, there = to_device(our_batch(core, observation), device), to_device(observation, device)

        def train_theirs(there=there) -> None:
            theirs.step(policy(there)[0])
            wait_for(device)

        def train_ours(batch=batch) -> None:
            with bfloat16(device):
                loss = our_loss(core, batch)
            ours.step(loss)
            wait_for(device)

        seconds = medians({"LeRobot": train_theirs, "ours": train_ours}, repeats=2 if quick else 10)
        found |= {f"{name}, B = {size}": size / value for name, value in seconds.items()}
    return found


def step_gb(device: torch.device, trains: str) -> dict[str, float]:
    """The peak memory of a training step in bfloat16, and what docs/scaling.md says of it (benchmarks/memory.py)."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    core, batch = big_core(device, trains)
    trained = [parameter for parameter in core.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained, OptimConfig())
    before = batch.images.nbytes
    for _ in range(2):
        with bfloat16(device):
            loss = masked_mean(core(batch)[ACTION], batch.masks[ACTION])
        loss.backward()
        clip_gradients(optimizer, trained, OptimConfig.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    measured = torch.cuda.max_memory_allocated() - before
    shape = make_core(core.config, TRUNK if trains == "expert" else [])
    counted = sum(state_bytes(shape).values()) + activation_bytes(shape, MemoryOptions(), sharded=False)
    return {f"{trains}, measured": measured / 1e9, f"{trains}, in docs/scaling.md": counted / 1e9}
