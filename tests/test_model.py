"""The whole core: equal to LeRobot's SmolVLA, and what its docstrings promise."""

import json
import sysconfig
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor, nn
from transformers import AutoTokenizer, SmolVLMConfig, SmolVLMModel

from smolvla_shared import flow
from smolvla_shared.batch import Batch, FlowTarget
from smolvla_shared.config import CoreConfig, ModelConfig
from smolvla_shared.kernels import LowWeights
from smolvla_shared.losses import masked_mean
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.model_parts import (
    configure_layers,
    freeze,
    frozen_parts,
    layers,
    parameter_table,
    parameters_by_part,
)
from smolvla_shared.normalization import Statistics
from smolvla_shared.preprocess import TextTokenizer, pad_width, prepare_images, stack_cameras
from smolvla_shared.trunk_files import make_core_config, trunk_location

TASKS = ["slide the plate into the cabinet", "open the door", "push the small red button, then wait."]
STATE_DIM, ACTION_DIM, CHUNK_SIZE = 4, 4, 16
CAMERAS = ("observation.images.top", "observation.images.wrist")
TRUNK = ["vision tower", "connector", "language layers"]


def make_config(num_cameras: int = 1, **dims) -> CoreConfig:
    dims = {"latent_vector_dim": 32, "code_seq_len": 4, "action_dim": ACTION_DIM, "chunk_size": CHUNK_SIZE} | dims
    return make_core_config(ModelConfig(preset="tiny"), CAMERAS[:num_cameras], state_dim=STATE_DIM, **dims)


def strengthen(module: nn.Module) -> None:
    """Random weights under which every token and every bias matters; initial ones leave attention nearly uniform."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else parameter + 0.1 * noise


def make_core(config: CoreConfig) -> SmolVLASharedCore:
    core = SmolVLASharedCore(config)
    strengthen(core)
    return core


def make_batch(config: CoreConfig, num_draws: int = 1) -> Batch:
    """Three samples with texts of unequal length and targets whose tails are padding."""
    generator = torch.Generator().manual_seed(1)
    batch = len(TASKS)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    def target(num_tokens: int, real_dim: int, width: int, valid: list[int]) -> FlowTarget:
        mask = torch.arange(num_tokens) < torch.tensor(valid)[:, None]
        time = torch.rand(batch, num_draws, generator=generator) * 0.999 + 0.001
        return FlowTarget(
            pad_width(normal(num_tokens, real_dim), width), mask, normal(num_draws, num_tokens, width), time
        )

    targets = {}
    if config.latent_vector_dim:
        targets["latent"] = target(config.code_seq_len, config.latent_dim, config.latent_dim, [4, 0, 4])
    if config.action_dim:
        targets["action"] = target(config.chunk_size, config.action_dim, config.max_action_dim, [16, 9, 1])
    tokenizer = AutoTokenizer.from_pretrained(trunk_location(config.model_name))
    return Batch(
        torch.rand(batch, len(config.cameras), 3, 64, 64, generator=generator) * 2 - 1,
        torch.ones(batch, len(config.cameras), dtype=torch.bool),
        *TextTokenizer(tokenizer, config.max_text_tokens)(TASKS),
        pad_width(normal(config.state_dim), config.max_state_dim),
        torch.ones(batch, dtype=torch.bool),
        targets,
    )


def total_loss(core: SmolVLASharedCore, batch: Batch) -> Tensor:
    return sum(masked_mean(errors, batch.masks[name]) for name, errors in core(batch).items())


def gradients(core: SmolVLASharedCore, batch: Batch) -> dict[str, Tensor]:
    core.zero_grad()
    total_loss(core, batch).backward()
    return {name: p.grad.clone() for name, p in core.named_parameters() if p.grad is not None}


def only(batch: Batch, name: str) -> Batch:
    """The batch with one of its targets."""
    return replace(batch, targets={name: batch.targets[name]})


def velocity(core: SmolVLASharedCore, batch: Batch, name: str, x_t: Tensor, time: Tensor) -> Tensor:
    """The predicted velocity at x_t [B, K, T, A] and time [B, K], without anything kept from an earlier call."""
    head = core.head(name)
    return head.velocity(core.expert(head.embed(x_t, time), core.encode(batch)))


@pytest.fixture(scope="module")
def core() -> SmolVLASharedCore:
    return make_core(make_config(num_cameras=2)).requires_grad_(False)


@pytest.fixture(scope="module")
def batch(core) -> Batch:
    return make_batch(core.config, num_draws=3)


# --- equal to LeRobot's SmolVLA ---------------------------------------------------------------------------------------


EMPTY_CAMERA = "observation.images.empty_camera_0"  # LeRobot's name for a camera that batches lack
FAKE_IMAGE, GLOBAL_IMAGE = 3, 5  # ids in the tiny tokenizer


def make_lerobot_policy(directory: Path, config: CoreConfig) -> SmolVLAPolicy:
    features = {camera: PolicyFeature(FeatureType.VISUAL, (3, 64, 64)) for camera in config.cameras}
    policy = SmolVLAPolicy(
        SmolVLAConfig(
            vlm_model_name=str(directory),
            load_vlm_weights=False,
            num_vlm_layers=config.num_trunk_layers,
            expert_width_multiplier=config.expert_width_multiplier,
            self_attn_every_n_layers=config.self_attn_every_n_layers,
            add_image_special_tokens=bool(config.image_special_tokens),
            empty_cameras=int(EMPTY_CAMERA in config.cameras),
            chunk_size=config.chunk_size,
            n_action_steps=config.chunk_size,
            resize_imgs_with_padding=(64, 64),
            input_features=features | {"observation.state": PolicyFeature(FeatureType.STATE, (STATE_DIM,))},
            output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
            device="cpu",
        )
    )
    strengthen(policy)
    return policy.requires_grad_(True)


def our_name(name: str) -> str | None:
    """LeRobot's parameter name -> ours; None for what the core leaves out because nothing reads it."""
    if "vlm.lm_head." in name or "text_model.norm." in name:
        return None
    for theirs, ours in {
        "model.vlm_with_expert.vlm.model.": "trunk.vlm.",
        "model.vlm_with_expert.lm_expert.": "expert.",
        "model.state_proj.": "state_proj.",
        "model.action_in_proj.": "action_head.in_proj.",
        "model.action_out_proj.": "action_head.out_proj.",
        "model.action_time_mlp_in.": "action_head.time_mlp_in.",
        "model.action_time_mlp_out.": "action_head.time_mlp_out.",
    }.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    raise AssertionError(name)


def for_lerobot(batch: Batch, images: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same batch as LeRobot's policy takes it, with these images [B, 3, h, w] in [0, 1] as recorded."""
    action = batch.targets["action"]
    return images | {
        "observation.state": batch.state[:, :STATE_DIM],
        "observation.language.tokens": batch.text,
        "observation.language.attention_mask": batch.text_mask,
        "action": action.value[..., :ACTION_DIM],
        "action_is_pad": ~action.mask,
    }


def relative_difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


ONE_CAMERA = {CAMERAS[0]: (64, 64)}  # (height, width) as recorded
THREE_CAMERAS = {CAMERAS[0]: (48, 80), "observation.images.left": (100, 75), CAMERAS[1]: (64, 64)}
MISSING_CAMERA = {CAMERAS[0]: (48, 80), EMPTY_CAMERA: None}
SPECIAL = {"image_special_tokens": (FAKE_IMAGE, GLOBAL_IMAGE)}


@pytest.mark.parametrize(
    ("cameras", "dims"),
    [
        pytest.param(ONE_CAMERA, {}, id="one camera"),
        pytest.param(THREE_CAMERAS, {}, id="three cameras of different shapes"),
        pytest.param(MISSING_CAMERA, {}, id="a missing camera"),
        pytest.param(THREE_CAMERAS, SPECIAL, id="image special tokens"),
        pytest.param(MISSING_CAMERA, SPECIAL, id="image special tokens around a missing camera"),
        pytest.param(ONE_CAMERA, {"chunk_size": 1}, id="chunks of 1"),
        pytest.param(ONE_CAMERA, {"chunk_size": 50}, id="chunks of 50"),
        pytest.param(ONE_CAMERA, {"expert_width_multiplier": 0.5}, id="expert of half the width"),
        pytest.param(ONE_CAMERA, {"expert_width_multiplier": 1.0}, id="expert of the same width"),
        pytest.param(ONE_CAMERA, {"self_attn_every_n_layers": 1}, id="self-attention only"),
        pytest.param(ONE_CAMERA, {"self_attn_every_n_layers": 3}, id="self-attention every 3 layers"),
        pytest.param(ONE_CAMERA, {"self_attn_every_n_layers": 4}, id="self-attention every 4 layers"),
    ],
)
def test_equals_lerobots_smolvla(tiny_vlm, cameras, dims):
    """Same weights, inputs, noise and time: same loss, gradients and sampled chunk. Texts differ in length, chunks end
    in padding; 3 and 4 layers between self-attention leave the last of 4 layers with and without it.
    """
    config = make_config(latent_vector_dim=0, code_seq_len=0, noisy_padding=True, **dims)
    config = replace(config, cameras=tuple(cameras))
    policy, core = make_lerobot_policy(tiny_vlm, config), SmolVLASharedCore(config)
    core.load_state_dict({our_name(name): tensor for name, tensor in policy.state_dict().items() if our_name(name)})

    generator = torch.Generator().manual_seed(2)
    recorded = {key: torch.rand(3, 3, *size, generator=generator) for key, size in cameras.items() if size}
    images, image_mask = stack_cameras(
        [prepare_images(recorded[key], config.image_size) if key in recorded else None for key in cameras]
    )
    batch = replace(make_batch(config), images=images, image_mask=image_mask)
    action = batch.targets["action"]
    assert batch.text_mask.sum(1).unique().numel() == 3

    expected, _ = policy(for_lerobot(batch, recorded), noise=action.noise[:, 0], time=action.time[:, 0])
    expected.backward()
    loss = total_loss(core, batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

    theirs = {our_name(name): p.grad for name, p in policy.named_parameters() if p.grad is not None}
    # Where the last layer attends to itself, LeRobot computes the trunk's queries, reads none, and their gradient is 0.
    theirs = {name: grad for name, grad in theirs.items() if grad.any()}
    ours = {name: p.grad for name, p in core.named_parameters() if p.grad is not None}
    assert set(ours) == set(theirs)
    differences = {name: relative_difference(ours[name], theirs[name]) for name in ours}
    for name in list(differences):
        if name.startswith("trunk.vlm.vision_model.") and name.endswith("k_proj.bias"):
            # Adding one vector to all keys of a layer changes no attention: the gradient is zero but for rounding.
            assert ours[name].norm() < 1e-6
            del differences[name]
    assert max(differences.values()) < 1e-5, {name: d for name, d in differences.items() if d >= 1e-5}

    chunk = policy.predict_action_chunk(for_lerobot(batch, recorded), noise=action.noise[:, 0])
    assert chunk.shape == (3, config.chunk_size, ACTION_DIM)
    assert relative_difference(core.sample(batch, "action", action.noise[:, 0]), chunk) < 1e-5


# --- one prefix for everything ----------------------------------------------------------------------------------------


def test_several_draws_equal_the_mean_of_single_draws():
    config = make_config()
    core, batch = make_core(config), make_batch(config, num_draws=3)
    singles = []
    for k in range(3):
        draw = {n: replace(t, noise=t.noise[:, [k]], time=t.time[:, [k]]) for n, t in batch.targets.items()}
        singles.append(replace(batch, targets=draw))

    errors, single_errors = core(batch), [core(single) for single in singles]
    for name in ("latent", "action"):
        mean = torch.stack([e[name] for e in single_errors]).mean(0)
        torch.testing.assert_close(errors[name], mean, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(errors[name], single_errors[0][name], rtol=1e-2)

    grads, single_grads = gradients(core, batch), [gradients(core, single) for single in singles]
    for name, grad in grads.items():
        mean = torch.stack([g[name] for g in single_grads]).mean(0)
        torch.testing.assert_close(grad, mean, rtol=1e-4, atol=1e-5, msg=name)


def test_both_heads_in_one_pass_equal_two_passes():
    config = make_config()
    core, batch = make_core(config), make_batch(config, num_draws=2)
    together = core(batch)
    assert list(together) == ["latent", "action"]
    for name, errors in together.items():
        assert errors.shape == batch.masks[name].shape
        torch.testing.assert_close(errors, core(only(batch, name))[name])

    grads = gradients(core, batch)
    parts = {name: gradients(core, only(batch, name)) for name in together}
    assert not any(name.startswith("action_head.") for name in parts["latent"])
    assert not any(name.startswith("latent_head.") for name in parts["action"])
    assert set(grads) == set(parts["latent"]) | set(parts["action"])
    for name, grad in grads.items():
        total = sum(part[name] for part in parts.values() if name in part)
        torch.testing.assert_close(grad, total, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("layers_frozen", [True, False])
def test_a_frozen_trunk_gives_the_same_errors_and_gradients_as_one_that_trains(layers_frozen):
    """Frozen language layers get the prefix in two parts, of which only the state token needs a backward pass."""
    config = make_config()
    trained, batch = make_core(config), make_batch(config)
    frozen = make_core(config)
    frozen.load_state_dict(trained.state_dict())
    freeze(frozen, TRUNK[: 2 + layers_frozen])
    parts = []
    frozen.trunk.vlm.text_model.layers[1].register_forward_pre_hook(lambda _, args: parts.append(args[0]))
    grads, expected = gradients(frozen, batch), gradients(trained, batch)
    requires_grad = [part.requires_grad for part in parts[0]]
    assert requires_grad == ([False, True] if layers_frozen else [True])
    assert any(name.startswith("state_proj.") for name in grads)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    for name, errors in frozen(batch).items():
        torch.testing.assert_close(errors, trained(batch)[name], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        frozen(batch)
    assert [len(p) for p in parts] == [1 + layers_frozen, 1 + layers_frozen, 1]


@pytest.mark.parametrize("name", ["latent", "action"])
def test_cached_sampling_equals_recomputing_everything_at_each_step(core, batch, name):
    noise, head = batch.targets[name].noise[:, 0], core.head(name)
    recomputed = flow.euler_sample(
        lambda x, t: velocity(core, batch, name, x[:, None], t[:, None])[:, 0], noise, core.config.flow_steps
    )
    sample = core.sample(batch, name, noise)
    assert sample.shape == (3, head.num_tokens, head.real_dim)
    torch.testing.assert_close(sample, recomputed[..., : head.real_dim], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(sample, core.sample(batch, name, noise, num_steps=1), atol=0.1)


def test_sampling_runs_the_prefix_once_and_the_expert_at_each_step(core, batch):
    calls = []
    layer = core.expert.layers[1]  # attends across
    watched = {"prefix": core.trunk, "prefix keys": layer.self_attn.k_proj, "layer": layer}
    hooks = [m.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, m in watched.items()]
    core.sample(batch, "action", batch.targets["action"].noise[:, 0], num_steps=5)
    for hook in hooks:
        hook.remove()
    assert calls == ["prefix", "prefix keys", *["layer"] * 5]


def test_training_error_is_that_of_the_velocity(core, batch):
    target = batch.targets["action"]
    value = target.value[:, None]
    time = target.time[..., None, None]
    v_t = velocity(core, batch, "action", time * target.noise + (1 - time) * value, target.time)
    error = (v_t - (target.noise - value))[..., :ACTION_DIM].square().mean(dim=(1, 3))
    torch.testing.assert_close(core(batch)["action"], error)


def test_unknown_dimensions_are_no_target():
    """NaN in a target: the other dimensions are learned, nothing is of this one, and nothing becomes NaN."""
    core = make_core(make_config())
    batch = make_batch(core.config)
    batch.targets["action"].value[..., 2] = torch.nan
    batch.targets["action"].value[0] = torch.nan  # a sample of which nothing is known
    errors = core(batch)["action"]
    assert errors[0].eq(0).all() and (errors[1:] > 0).all()
    errors.sum().backward()
    gradients = [p.grad for p in core.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    rows = core.action_head.out_proj.weight.grad.norm(dim=1)
    assert rows[2] == 0 and (rows[[0, 1, 3]] > 0).all()


def test_padded_action_dimensions_are_no_target(core, batch):
    target = batch.targets["action"]
    target = replace(target, time=torch.ones_like(target.time))  # x_t is noise: values enter the error only as targets
    other = replace(target, value=target.value + (torch.arange(32) >= ACTION_DIM) * 5.0)
    errors = [core(replace(batch, targets={"action": t}))["action"] for t in (target, other)]
    torch.testing.assert_close(errors[0], errors[1])


# --- who sees whom ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "j"), [("latent", 2), ("action", 1), ("action", 9)])
def test_suffix_is_causal(core, batch, name, j):
    target = batch.targets[name]
    changed = target.noise.clone()
    changed[:, :, j] += 1
    before = velocity(core, batch, name, target.noise, target.time)
    after = velocity(core, batch, name, changed, target.time)
    torch.testing.assert_close(before[:, :, :j], after[:, :, :j], rtol=1e-5, atol=1e-5)
    moved = (before - after).abs().amax(-1)[:, :, j:]
    assert (moved > 1e-3).all()  # every later token sees it


def test_draws_do_not_see_each_other(core, batch):
    target = batch.targets["action"]
    changed = target.noise.clone()
    changed[:, 1] += 1
    before = velocity(core, batch, "action", target.noise, target.time)
    after = velocity(core, batch, "action", changed, target.time)
    torch.testing.assert_close(before[:, [0, 2]], after[:, [0, 2]], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before[:, 1], after[:, 1], atol=0.1)


def test_samples_do_not_see_each_other(core, batch):
    alone = core(
        replace(
            batch,
            **{key: getattr(batch, key)[1:2] for key in ("images", "image_mask", "text", "text_mask", "state")},
            state_mask=batch.state_mask[1:2],
            targets={n: FlowTarget(**{k: v[1:2] for k, v in vars(t).items()}) for n, t in batch.targets.items()},
        )
    )
    for name, errors in core(batch).items():
        torch.testing.assert_close(errors[1:2], alone[name], rtol=1e-5, atol=1e-5)


def test_the_state_of_a_sample_without_one_has_no_influence(core, batch):
    without = replace(batch, state_mask=torch.tensor([True, False, True]))
    other = replace(without, state=without.state + 3)
    errors, other_errors = core(without), core(other)
    for name in errors:
        assert torch.equal(errors[name][1], other_errors[name][1])
        assert not torch.isclose(errors[name][[0, 2]], other_errors[name][[0, 2]], rtol=1e-3).all(1).any()


def test_image_and_text_do_not_see_the_state(core, batch):
    prefix, other = core.encode(batch), core.encode(replace(batch, state=batch.state + 3))
    for (keys, values), (other_keys, other_values) in zip(prefix.keys_values, other.keys_values, strict=True):
        for one, two in [(keys, other_keys), (values, other_values)]:
            torch.testing.assert_close(one[:, :, :-1], two[:, :, :-1])
            assert not torch.allclose(one[:, :, -1], two[:, :, -1], atol=0.1)


def test_the_state_token_sees_image_and_text(core, batch):
    states = [core.encode(b).keys_values[-1][1][:, :, -1] for b in (batch, replace(batch, text=batch.text.roll(1, 0)))]
    assert (states[0] - states[1]).abs().amax(dim=(1, 2)).min() > 1e-3


# --- freezing ---------------------------------------------------------------------------------------------------------

TINY, PRETRAINED = make_config(), replace(make_config(), model_name="someone/smolvlm")


@pytest.mark.parametrize(
    ("options", "config", "parts"),
    [
        ({}, TINY, []),
        ({}, PRETRAINED, ["vision tower", "connector", "language layers"]),
        ({"freeze_vision": True}, TINY, ["vision tower", "connector"]),
        ({"freeze_trunk": True}, TINY, ["vision tower", "connector", "language layers"]),
        ({"freeze_trunk": False}, PRETRAINED, ["vision tower", "connector"]),
        ({"freeze_trunk": False, "freeze_vision": False}, PRETRAINED, []),
        ({"freeze_state_projection": True}, TINY, ["state projection"]),
    ],
)
def test_options_name_the_frozen_parts(options, config, parts):
    assert frozen_parts(ModelConfig(**options), config, ["latent", "action"]) == parts


def test_a_head_without_a_target_is_frozen():
    both = replace(TINY, latent_vector_dim=32, code_seq_len=4, action_dim=4)
    assert frozen_parts(ModelConfig(), both, ["latent"]) == ["action head"]
    assert frozen_parts(ModelConfig(), both, ["action"]) == ["latent head"]
    assert frozen_parts(ModelConfig(), replace(both, action_dim=0), ["latent"]) == []


def read_table(table: str) -> dict[str, tuple[int, int]]:
    rows = [line.rsplit(maxsplit=2) for line in table.splitlines()[1:]]
    return {part: (int(trained.replace(",", "")), int(frozen.replace(",", ""))) for part, trained, frozen in rows}


def test_parameters_are_counted():
    core = SmolVLASharedCore(TINY)
    vlm = SmolVLMModel(SmolVLMConfig.from_dict(TINY.vlm))
    unused = 2 * 128 * 128 + 3 * 128 * 256 + 128  # of the last language layer: q, o, MLP and its norm
    # Width 96, 4 heads of 32 of which 2 for keys and values, MLP 256; every other layer has keys and values of its own.
    attention = {"self": 96 * 128 + 2 * 96 * 64 + 128 * 96, "cross": 96 * 128 + 2 * 64 * 64 + 128 * 96}
    expert = sum(2 * attention[kind] for kind in attention) + 4 * (3 * 96 * 256 + 2 * 96) + 96

    def head(width: int) -> int:
        return (width + 1) * 96 + (2 * 96 + 1) * 96 + (96 + 1) * 96 + (96 + 1) * width

    counts = {
        "vision tower": (vlm.vision_model.num_parameters(), 0),
        "connector": (sum(p.numel() for p in vlm.connector.parameters()), 0),
        "language layers": (vlm.text_model.num_parameters() - 128 - unused, unused),  # without the final norm
        "expert": (expert, 0),
        "state projection": (33 * 128, 0),
        "latent head": (head(8), 0),
        "action head": (head(32), 0),
    }
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    assert read_table(parameter_table(core)) == counts | {"total": tuple(total)}

    freeze(core, ["vision tower", "state projection"])
    for part in ("vision tower", "state projection"):
        counts[part] = counts[part][::-1]
    moved = counts["vision tower"][1] + counts["state projection"][1]
    assert read_table(parameter_table(core)) == counts | {"total": (total[0] - moved, total[1] + moved)}


def test_freezing_a_part_that_is_not_there_is_refused():
    core = SmolVLASharedCore(make_config(latent_vector_dim=0, code_seq_len=0))
    with pytest.raises(ValueError, match=r"cannot freeze 'latent head': this model has vision tower, .*, action head"):
        freeze(core, ["expert", "latent head"])
    with pytest.raises(ValueError, match="cannot freeze 'vision'"):
        freeze(core, ["vision"])


@pytest.mark.parametrize(
    "parts",
    [
        [],
        ["vision tower", "connector"],
        ["vision tower", "connector", "language layers"],
        ["state projection"],
        ["expert", "latent head"],
    ],
)
def test_a_step_changes_what_is_not_frozen_and_nothing_else(parts):
    core = make_core(TINY)
    freeze(core, parts)
    before = {name: tensor.clone() for name, tensor in core.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in core.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    total_loss(core, make_batch(TINY)).backward()
    optimizer.step()
    changed = {name for name, tensor in core.state_dict().items() if not torch.equal(tensor, before[name])}

    last = "trunk.vlm.text_model.layers.3."  # only its keys and values are read
    read = ("self_attn.k_proj.weight", "self_attn.v_proj.weight", "input_layernorm.weight")
    expected = {
        name
        for part, parameters in parameters_by_part(core).items()
        for name in parameters
        if part not in parts and (not name.startswith(last) or name.endswith(read))
    }
    assert changed == expected


def test_under_a_frozen_trunk_only_the_state_token_is_differentiated():
    config = make_config()
    core, batch = make_core(config), make_batch(config)
    freeze(core, ["vision tower", "connector", "language layers"])
    differentiated = []
    for layer in core.trunk.vlm.text_model.layers:
        layer.register_forward_hook(
            lambda _, __, out: differentiated.append([hidden.requires_grad for hidden in out[0]])
        )
    grads = gradients(core, batch)
    assert differentiated == [[False, True]] * config.num_trunk_layers
    assert grads["state_proj.weight"].norm() > 0


# --- from configuration to outputs ------------------------------------------------------------------------------------


def test_config_as_json_rebuilds_an_equal_core(core, batch):
    config = CoreConfig(**json.loads(json.dumps(asdict(core.config))))
    assert config == core.config
    rebuilt = SmolVLASharedCore(config)
    rebuilt.load_state_dict(core.state_dict())
    for name, errors in core(batch).items():
        assert torch.equal(rebuilt(batch)[name], errors)
        noise = batch.targets[name].noise[:, 0]
        assert torch.equal(rebuilt.sample(batch, name, noise), core.sample(batch, name, noise))


def test_heads_exist_where_they_are_configured():
    latent_only = make_config(action_dim=0)
    names = set(SmolVLASharedCore(latent_only).state_dict())
    assert any(name.startswith("latent_head.") for name in names)
    assert not any(name.startswith("action_head.") for name in names)
    assert set(SmolVLASharedCore(make_config()).state_dict()) > names


@pytest.mark.parametrize("frozen", [[], TRUNK])
@pytest.mark.parametrize("trunk_dtype", ["float32", "bfloat16"])
def test_autocast_to_bfloat16_stays_near_float32(core, batch, trunk_dtype, frozen):
    low = SmolVLASharedCore(replace(core.config, torch_dtype=trunk_dtype))
    low.load_state_dict(core.state_dict())
    freeze(low, frozen)
    with torch.autocast("cpu", torch.bfloat16):
        errors = low(batch)
        sample = low.sample(batch, "action", batch.targets["action"].noise[:, 0])
        sum(e.mean() for e in errors.values()).backward()
    for name, expected in core(batch).items():
        assert errors[name].dtype == torch.float32
        assert 1e-6 < relative_difference(errors[name], expected) < 0.03  # bfloat16 keeps 8 bits: 0.004 a rounding
    assert sample.dtype == torch.float32
    expected = core.sample(batch, "action", batch.targets["action"].noise[:, 0])
    assert relative_difference(sample, expected) < 0.03
    assert all(p.grad.isfinite().all() for p in low.parameters() if p.grad is not None)


@pytest.mark.parametrize("frozen", [[], TRUNK])
def test_weights_cast_as_one_train_as_autocast_casts_them(batch, frozen, monkeypatch):
    core, one_head = make_core(make_config(num_cameras=2)), {"action": batch.targets["action"]}
    freeze(core, frozen)
    own = dict(core.named_parameters())

    def step() -> dict[str, Tensor]:
        core.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = core(replace(batch, targets=one_head))["action"].mean()
        loss.backward()
        return {"loss": loss} | {name: p.grad for name, p in core.named_parameters() if p.grad is not None}

    as_one = step()
    configure_layers(core.train(), ModelConfig(activation_checkpointing=True))
    checkpointed = step()
    monkeypatch.setattr(LowWeights, "casts", staticmethod(lambda *_: False))
    torch.testing.assert_close(as_one, step(), rtol=0, atol=0)
    torch.testing.assert_close(as_one, checkpointed, rtol=0, atol=0)
    assert all(parameter is own[name] for name, parameter in core.named_parameters())


def test_a_bfloat16_trunk_serves_a_float32_expert(core, batch):
    low = SmolVLASharedCore(replace(core.config, torch_dtype="bfloat16"))
    low.load_state_dict(core.state_dict())
    errors = low(batch)  # without autocast
    for name, expected in core(batch).items():
        assert errors[name].dtype == torch.float32
        assert 1e-6 < relative_difference(errors[name], expected) < 0.03


def test_a_bfloat16_trunk_computes_the_same_with_and_without_autocast(core, batch):
    """It needs no autocast; features are then cached as training computes them."""
    low = SmolVLASharedCore(replace(core.config, torch_dtype="bfloat16"))
    low.load_state_dict(core.state_dict())
    prefix = low.encode(batch)
    with torch.autocast("cpu", torch.bfloat16):
        of_autocast = low.encode(batch)
        with low.trunk.own_precision():
            assert not torch.is_autocast_enabled("cpu")
        with core.trunk.own_precision():
            assert torch.is_autocast_enabled("cpu")
    for pair, other in zip(prefix.keys_values, of_autocast.keys_values, strict=True):
        assert all(x.dtype == torch.bfloat16 and torch.equal(x, y) for x, y in zip(pair, other, strict=True))


# --- layer by layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [[], TRUNK])
def test_activation_checkpointing_changes_nothing_but_what_is_kept(frozen):
    config = make_config()
    core, batch = make_core(config), make_batch(config, num_draws=2)
    freeze(core, frozen)
    calls = dict.fromkeys(layers(core), 0)
    for layer in calls:
        layer.register_forward_pre_hook(lambda layer, *_: calls.update({layer: calls[layer] + 1}))
    names = list(core.state_dict())
    core.train()

    def step() -> tuple[dict[str, Tensor], dict[str, Tensor], set[int], float]:
        calls.update(dict.fromkeys(calls, 0))
        kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            errors = core(batch)
        core.zero_grad()
        sum(masked_mean(e, batch.masks[name]) for name, e in errors.items()).backward()
        grads = {name: p.grad for name, p in core.named_parameters() if p.grad is not None}
        return errors, grads, set(calls.values()), kept

    errors, grads, plain_calls, plain_kept = step()
    configure_layers(core, ModelConfig(activation_checkpointing=True))
    errors_again, grads_again, checkpointed_calls, kept = step()
    assert list(core.state_dict()) == names
    torch.testing.assert_close(errors_again, errors, rtol=0, atol=0)
    torch.testing.assert_close(grads_again, grads, rtol=0, atol=0)
    assert plain_calls == {1, 2}  # an expert layer serves two heads
    # Each layer is run again in the backward pass; but for those of the vision tower, where it has none.
    assert checkpointed_calls == ({1, 2, 4} if frozen else {2, 4})
    assert kept < (0.3 if frozen else 0.2) * plain_kept


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [TRUNK[:2], TRUNK])
def test_compiled_layers_equal_plain_ones(frozen):
    config = replace(make_config(latent_vector_dim=0, code_seq_len=0), num_trunk_layers=2)
    core, batch = make_core(config), make_batch(config, num_draws=2)
    freeze(core, frozen)
    errors, grads, names = core(batch), gradients(core, batch), list(core.state_dict())

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    configure_layers(core, ModelConfig(compile=True, activation_checkpointing=True))
    core.train()
    assert relative_difference(core(batch)["action"], errors["action"]) < 1e-5
    differences = {name: relative_difference(grad, grads[name]) for name, grad in gradients(core, batch).items()}
    assert differences.keys() == grads.keys()
    assert max(differences.values()) < 1e-4
    assert list(core.state_dict()) == names
    # Layers of a kind share their code: one of vision, one of the trunk, the expert's two. All are whole.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiling_without_a_compiler_is_refused(core, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"--model\.compile.*no-such-compiler.*apt-get install g\+\+"):
        configure_layers(core, ModelConfig(compile=True))
    monkeypatch.undo()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "/no/headers")
    with pytest.raises(
        ValueError, match=r"--model\.compile needs Python's headers.*/no/headers/Python\.h.*python3\.12-dev"
    ):
        configure_layers(core, ModelConfig(compile=True))
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(ValueError, match=r"--model\.compile needs a C compiler \(apt-get install gcc"):
        configure_layers(core, ModelConfig(compile=True))


# --- its configuration ------------------------------------------------------------------------------------------------


def test_make_core_config_takes_sizes_from_trunk_and_data(tiny_vlm):
    config = make_config(num_cameras=2)
    assert (config.model_name, config.model_revision, config.cameras) == ("tiny", None, CAMERAS)
    assert (config.image_size, config.num_trunk_layers, config.latent_dim) == (64, 4, 8)
    local = make_core_config(ModelConfig(name=str(tiny_vlm), revision="main"), CAMERAS[:1], action_dim=2)
    assert (local.model_name, local.model_revision, local.vlm) == (str(tiny_vlm), "main", config.vlm)
    assert (local.action_dim, local.latent_vector_dim, local.state_dim) == (2, 0, 0)


def test_make_core_config_keeps_sixteen_of_more_layers(tiny_vlm, tmp_path):
    deep = json.loads((tiny_vlm / "config.json").read_text())
    deep["text_config"]["num_hidden_layers"] = 32
    (tmp_path / "config.json").write_text(json.dumps(deep))
    assert make_core_config(ModelConfig(name=str(tmp_path)), CAMERAS, action_dim=2).num_trunk_layers == 16


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"latent_vector_dim": 30}, "latent_vector_dim 30.*code_seq_len 4"),
        ({"action_dim": 40}, "action has 40 dimensions.*at most 32.*raise max_action_dim"),
    ],
)
def test_make_core_config_refuses_sizes_that_do_not_fit(dims, message):
    with pytest.raises(ValueError, match=message):
        make_config(**dims)


def test_make_core_config_refuses_a_trunk_it_cannot_find(tmp_path):
    with pytest.raises(ValueError, match=rf"--model\.name {tmp_path}: no such directory, or no config\.json"):
        make_core_config(ModelConfig(name=str(tmp_path)), CAMERAS, action_dim=2)


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_overfitting_a_batch_lowers_the_loss_and_samples_approach_the_targets():
    torch.manual_seed(0)
    config = make_config()
    core, batch = SmolVLASharedCore(config), make_batch(config, num_draws=8)
    for target in batch.targets.values():
        target.mask[:] = True
    optimizer = torch.optim.AdamW(core.parameters(), lr=2e-3)
    losses = []
    for _ in range(120):
        for target in batch.targets.values():
            target.noise.normal_()
            target.time.uniform_(0.001, 1)
        optimizer.zero_grad()
        loss = total_loss(core, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.25 * sum(losses[:10])

    for name, target in batch.targets.items():
        sample = core.sample(batch, name, torch.randn_like(target.noise[:, 0]))
        truth = target.value[..., : sample.shape[-1]]
        error_of_mean = (truth - truth.mean(0)).square().mean()  # of the best answer that ignores the observation
        assert (sample - truth).square().mean() < 0.25 * error_of_mean
        assert torch.corrcoef(torch.stack([sample.flatten(), truth.flatten()]))[0, 1] > 0.9


# --- the head that classifies codes -----------------------------------------------------------------------------------


CODEBOOK = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def classifier() -> SmolVLASharedCore:
    core = make_core(make_config(codebook_size=5))
    core.learn_codes(CODEBOOK, Statistics((0.5,) * 32, tuple(1 + slot / 2 for slot in range(4) for _ in range(8))))
    return core


def coded_batch(core: SmolVLASharedCore) -> tuple[Batch, Tensor]:
    """A batch whose latents are codes, normalised by hand; and which codes these are [B, S]."""
    batch = make_batch(core.config)
    codes = torch.randint(0, 5, (3, 4), generator=torch.Generator().manual_seed(3))
    value = (CODEBOOK[codes] - 0.5) / (1 + torch.arange(4) / 2)[:, None]
    target = batch.targets["latent"]
    return replace(batch, targets=batch.targets | {"latent": replace(target, value=value)}), codes


def test_the_error_of_a_code_is_its_cross_entropy(classifier):
    batch, codes = coded_batch(classifier)
    found = classifier(batch)
    log_probabilities = classifier.code_logits(classifier.latent_head, classifier.encode(batch), 3).log_softmax(-1)
    torch.testing.assert_close(found["latent"], -log_probabilities.gather(-1, codes[..., None])[..., 0])
    assert found["action"].shape == (3, CHUNK_SIZE)  # the action head is there as ever


def test_the_sample_of_a_classifier_is_its_mean_code_and_needs_no_noise(classifier):
    batch, _ = coded_batch(classifier)
    probabilities = classifier.code_logits(classifier.latent_head, classifier.encode(batch), 3).softmax(-1)
    expected = sum(probabilities[..., code, None] * classifier.latent_head.codebook[:, code] for code in range(5))
    for noise in (batch.targets["latent"].noise[:, 0], torch.zeros(3, 4, 8)):
        torch.testing.assert_close(classifier.sample(batch, "latent", noise), expected)


def test_a_classifier_learns_the_codes_of_its_samples(classifier):
    """Overfitted, its sample is the target; a copy that is rebuilt from config and weights has learned it, too."""
    core = SmolVLASharedCore(classifier.config)
    core.load_state_dict(classifier.state_dict())
    batch, _ = coded_batch(core)
    batch = only(batch, "latent")
    batch.targets["latent"].mask[:] = True
    optimizer = torch.optim.AdamW(core.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        core(batch)["latent"].mean().backward()
        optimizer.step()
    rebuilt = SmolVLASharedCore(CoreConfig(**json.loads(json.dumps(asdict(core.config)))))
    rebuilt.load_state_dict(core.state_dict())
    sample = rebuilt.sample(batch, "latent", torch.zeros(3, 4, 8))
    torch.testing.assert_close(sample, batch.targets["latent"].value, atol=0.2, rtol=0)
