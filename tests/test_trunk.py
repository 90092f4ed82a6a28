"""The trunk's masks as they are drawn, its padding, its rotation, and what it loads and refuses."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lerobot.policies.common.vla_utils import make_att_2d_masks
from lerobot.policies.smolvla.smolvlm_with_expert import apply_rope
from safetensors.torch import load_file, save_file
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMModel

from smolvla_shared.attention import attend, attention_bias, rotate, rotation
from smolvla_shared.batch import Batch
from smolvla_shared.command import is_mistake
from smolvla_shared.config import CoreConfig, ModelConfig
from smolvla_shared.trunk import Expert, Prefix, Trunk, prefix_attention_mask, suffix_attention_mask
from smolvla_shared.trunk_files import (
    load_trunk_config,
    load_trunk_tokenizer,
    load_trunk_weights,
    make_core_config,
    trunk_location,
)

IMAGE_TOKENS = 16  # of a camera, in the tiny trunk


@pytest.fixture(scope="module")
def config() -> CoreConfig:
    return make_core_config(ModelConfig(preset="tiny"), ("top",), action_dim=4)


# --- vision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 32, 48])
def test_image_tokens_equal_transformers_own(config, size):
    torch.manual_seed(0)
    trunk = Trunk(replace(config, image_size=size))
    images = torch.rand(2, 3, size, size) * 2 - 1
    patches = trunk.vlm.vision_model(images).last_hidden_state
    expected = trunk.vlm.connector(patches)
    torch.testing.assert_close(trunk.embed_images(images[:, None])[:, 0], expected, rtol=1e-5, atol=1e-6)


# --- masks ------------------------------------------------------------------------------------------------------------


def drawing(function) -> list[str]:
    """The rows of a docstring's picture without their labels: "x x .   x" -> "xx.x"."""
    rows = re.findall(r"^ *(?:from)? *(?:image|text|state|\d) +((?:[x.] *)+)(?:\(.*\))?$", function.__doc__, re.M)
    return [row.replace(" ", "") for row in rows]


def as_text(mask: torch.Tensor) -> list[str]:
    """[tokens, keys] bool -> a line for each token."""
    return ["".join("x" if seen else "." for seen in row) for row in mask.tolist()]


def test_prefix_mask_is_as_drawn():
    image, text, state = drawing(prefix_attention_mask)
    valid = torch.tensor([[True, True, True, True, False, True]])  # two image tokens, three of text, the state
    assert as_text(prefix_attention_mask(valid)[0, 0]) == [image, image, text, text, text, state]


def test_suffix_mask_is_as_drawn():
    rows = drawing(suffix_attention_mask)
    assert len(rows) == 3
    assert as_text(suffix_attention_mask(torch.tensor([[True, True, False]]), 3)[0, 0]) == rows


def test_masks_follow_smolvlas_block_rule():
    generator = torch.Generator().manual_seed(0)
    valid = torch.rand(20, 9, generator=generator) < 0.7  # some without state, in the last place
    blocks = torch.tensor([[0] * 8 + [1] + [1] * 4])  # image and text, state, suffix
    suffix_valid = torch.ones(20, 4, dtype=torch.bool)
    expected = make_att_2d_masks(torch.cat([valid, suffix_valid], dim=1), blocks.expand(20, -1))
    # LeRobot also stops padding from attending; what padding computes is never read, so only valid rows must agree.
    assert torch.equal(prefix_attention_mask(valid)[:, 0][valid], expected[:, :9, :9][valid])
    assert torch.equal(suffix_attention_mask(valid, 4)[:, 0], expected[:, 9:])


@pytest.mark.parametrize("heads", [(15, 5), (4, 4)])
@pytest.mark.parametrize("rows", [7, 1])  # of the mask
def test_groups_as_rows_are_grouped_query_attention_to_the_bit(heads, rows):
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(2, n, 7, 8, generator=generator) for n in (heads[0], heads[1], heads[1]))
    mask = torch.rand(2, 1, rows, 7, generator=generator) < 0.7
    mask[..., 0] = True
    bias = attention_bias(mask, torch.float32, heads[0] // heads[1] if rows > 1 else 1)
    expected = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
    assert torch.equal(attend(query, (keys, values), bias), expected.transpose(1, 2).flatten(2))


def test_rows_of_a_bias_are_aligned():
    """PyTorch's memory-efficient kernels need strides of 8; it copies other biases before every call."""
    bias = attention_bias(torch.tensor([[[[True, False, True]]]]).repeat(2, 1, 4, 3), torch.bfloat16, groups=2)
    assert (bias.shape, bias.stride()) == ((2, 1, 8, 9), (128, 128, 16, 1))
    assert bias[1, 0, 7].tolist() == [0, -torch.inf, 0] * 3


# --- rotation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_lerobots(dtype):
    x = torch.randn(2, 5, 7, 32, generator=torch.Generator().manual_seed(0)).to(dtype)  # [B, heads, L, head_dim]
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 50, 51, 1000]])
    rotated = rotate(x, rotation(positions, 32))
    assert rotated.dtype == dtype
    expected = apply_rope(x.transpose(1, 2), positions).transpose(1, 2)  # in float32, too, then rounded
    torch.testing.assert_close(rotated, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_rotation_has_the_gradient_of_its_formula():
    x = torch.randn(2, 2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    cos, sin = rotation(torch.tensor([[0, 1, 50]]), 8)
    assert torch.autograd.gradcheck(lambda x: rotate(x, (cos.double(), sin.double())), x)


@pytest.mark.slow
def test_a_compiled_rotation_has_the_same_gradient():
    x = torch.randn(2, 3, 2, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.arange(96.0).view(2, 2, 3, 8)
    of_places = rotation(torch.tensor([[0, 1, 50]]), 8)
    plain, compiled = (f(x.transpose(1, 2), of_places) for f in (rotate, torch.compile(rotate, dynamic=True)))
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (plain, compiled)]
    torch.testing.assert_close(*gradients)


def test_rotated_products_depend_on_distance_only():
    query, key = torch.randn(2, 1, 1, 1, 32, generator=torch.Generator().manual_seed(0))

    def product(query_position: int, key_position: int) -> float:
        rotated = [
            rotate(x, rotation(torch.tensor([[position]]), 32))
            for x, position in [(query, query_position), (key, key_position)]
        ]
        return (rotated[0] * rotated[1]).sum().item()

    assert product(5, 2) == pytest.approx(product(103, 100), abs=1e-4)
    assert product(5, 2) != pytest.approx(product(5, 3), abs=1e-2)


# --- padding ----------------------------------------------------------------------------------------------------------


def make_inputs(trunk: Trunk, num_cameras: int = 1, num_text: int = 6) -> dict[str, torch.Tensor]:
    """Two samples, the second with a shorter text."""
    generator = torch.Generator().manual_seed(0)
    return {
        "images": torch.rand(2, num_cameras, 3, 64, 64, generator=generator) * 2 - 1,
        "image_mask": torch.ones(2, num_cameras, dtype=torch.bool),
        "text": torch.randint(7, 1024, (2, num_text), generator=generator),
        "text_mask": torch.arange(num_text) < torch.tensor([[num_text], [num_text - 2]]),
        "state_token": torch.randn(2, trunk.hidden_size, generator=generator),
        "state_mask": torch.ones(2, dtype=torch.bool),
    }


def encode(trunk: Trunk, inputs: dict[str, torch.Tensor]) -> Prefix:
    fields = {name: value for name, value in inputs.items() if name != "state_token"}
    return trunk(Batch(**fields, state=torch.zeros(2, 0), targets={}), inputs["state_token"])


def valid_keys_values(prefix: Prefix) -> list[torch.Tensor]:
    """Of every layer and sample, the keys and values that may be read: [heads, valid tokens, head_dim]."""
    return [x[i][:, valid] for pair in prefix.keys_values for x in pair for i, valid in enumerate(prefix.mask)]


def assert_same_for_the_expert(config: CoreConfig, one: Prefix, other: Prefix) -> None:
    """Valid keys and values are equal, and so is what the expert makes of them."""
    for a, b in zip(valid_keys_values(one), valid_keys_values(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    expert = Expert(config)
    tokens = torch.randn(2, 3, 5, expert.width)
    torch.testing.assert_close(expert(tokens, one), expert(tokens, other), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def trunk(config) -> Trunk:
    torch.manual_seed(0)
    trunk = Trunk(config)
    for parameter in trunk.parameters():  # large enough weights for attention to matter
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return trunk.requires_grad_(False)


def test_text_padding_changes_nothing(config, trunk):
    inputs = make_inputs(trunk)
    noise = torch.randint(7, 1024, (2, 5), generator=torch.Generator().manual_seed(1))
    padded = inputs | {
        "text": torch.cat([torch.where(inputs["text_mask"], inputs["text"], 500), noise], dim=1),
        "text_mask": torch.nn.functional.pad(inputs["text_mask"], (0, 5)),
    }
    assert_same_for_the_expert(config, encode(trunk, inputs), encode(trunk, padded))


@pytest.mark.parametrize("place", [0, 1])
def test_a_masked_camera_of_noise_changes_nothing(config, trunk, place):
    inputs = make_inputs(trunk)
    noise = torch.randn(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    hidden = torch.zeros(2, 1, dtype=torch.bool)
    images, masks = [inputs["images"], inputs["images"]], [inputs["image_mask"], inputs["image_mask"]]
    images[place], masks[place] = noise, hidden
    two = inputs | {"images": torch.cat(images, dim=1), "image_mask": torch.cat(masks, dim=1)}
    prefix = encode(trunk, two)
    assert prefix.mask.sum() == encode(trunk, inputs).mask.sum() == 2 * (IMAGE_TOKENS + 1) + 6 + 4
    assert_same_for_the_expert(config, encode(trunk, inputs), prefix)


def test_an_unmasked_camera_changes_every_layer_but_the_first(trunk):
    one = make_inputs(trunk, num_cameras=2)
    other = one | {"images": one["images"].flip(1)}
    text = slice(2 * IMAGE_TOKENS, -1)
    for layer, ((keys, _), (other_keys, _)) in enumerate(
        zip(encode(trunk, one).keys_values, encode(trunk, other).keys_values, strict=True)
    ):
        assert torch.allclose(keys[:, :, text], other_keys[:, :, text], atol=1e-3) == (layer == 0)


def test_image_tokens_are_smolvlms(trunk):
    images = make_inputs(trunk, num_cameras=2)["images"]
    # The trunk lacks a final norm only, which SmolVLM's own image path does not use.
    expected = trunk.vlm.get_image_features(pixel_values=images).pooler_output
    torch.testing.assert_close(trunk.embed_images(images).flatten(0, 1), expected)


# --- what is loaded and what is refused -------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(config, tmp_path):
    """A SmolVLM with two more language layers than the core keeps, as its makers would save it."""
    vlm_config = SmolVLMConfig.from_dict(config.vlm)
    vlm_config.text_config.num_hidden_layers = 6
    torch.manual_seed(1)
    SmolVLMForConditionalGeneration(vlm_config).save_pretrained(tmp_path)
    return tmp_path


def assert_loaded(trunk: Trunk, weights: dict[str, torch.Tensor]) -> None:
    own = trunk.vlm.state_dict()
    assert set(own) == {name for name in weights if not re.match(r"lm_head|text_model\.(norm|layers\.[45])\.", name)}
    assert all(torch.equal(own[name], weights[name]) for name in own)


def loaded(config: CoreConfig, checkpoint: Path) -> Trunk:
    """A trunk with the weights of a SmolVLM's directory, all of them and no others."""
    weights = load_trunk_weights(replace(config, model_name=str(checkpoint)))
    trunk = Trunk(config)
    trunk.load_state_dict({name.removeprefix("trunk."): tensor for name, tensor in weights.items()})
    return trunk


def test_a_whole_smolvlm_is_loaded(config, checkpoint):
    trunk = loaded(config, checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    assert_loaded(trunk, {name.removeprefix("model."): tensor for name, tensor in weights.items()})


def test_a_smolvlm_without_language_head_is_loaded(config, checkpoint, tmp_path):
    SmolVLMModel.from_pretrained(checkpoint).save_pretrained(tmp_path / "base")
    trunk = loaded(config, tmp_path / "base")
    assert_loaded(trunk, load_file(tmp_path / "base" / "model.safetensors"))


@pytest.mark.parametrize(
    "name", ["connector.modality_projection.proj.weight", "text_model.layers.2.self_attn.k_proj.weight"]
)
def test_incomplete_weights_are_refused(config, checkpoint, name):
    weights = load_file(checkpoint / "model.safetensors")
    del weights[f"model.{name}"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"--model\.name {checkpoint}: the weights lack {re.escape(name)}"):
        loaded(config, checkpoint)


GATE = "text_model.layers.0.mlp.gate_proj.weight"


def rewrite_gate(checkpoint: Path, change) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    weights[f"model.{GATE}"] = change(weights[f"model.{GATE}"])
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


def fewer_layers(checkpoint: Path) -> None:
    body = json.loads((checkpoint / "config.json").read_text())
    body["text_config"]["num_hidden_layers"] = 5
    (checkpoint / "config.json").write_text(json.dumps(body))


WRONG_WEIGHTS = {
    "not there": (lambda path: (path / "model.safetensors").unlink(), "cannot be loaded: Error no file named"),
    "empty": (lambda path: (path / "model.safetensors").write_bytes(b""), "cannot be loaded: SafetensorError .*header"),
    "cut": (lambda path: os.truncate(path / "model.safetensors", 9000), "cannot be loaded: SafetensorError .*header"),
    "an index": (lambda path: (path / "model.safetensors").rename(path / "model.safetensors.index.json"), "cannot be"),
    "not finite": (lambda path: rewrite_gate(path, lambda gate: gate * torch.nan), rf"are not finite: {GATE}: copy"),
    "narrower": (
        lambda path: rewrite_gate(path, lambda gate: gate[:5].clone()),
        rf"have other shapes .*: {GATE} \[5, 128\] for \[256, 128\]",
    ),
    "more layers": (fewer_layers, r"have more layers than its config.json: .*text_model.layers.5.mlp"),
}


@pytest.mark.parametrize("what", WRONG_WEIGHTS)
def test_wrong_weights_are_refused(config, checkpoint, what):
    damage, said = WRONG_WEIGHTS[what]
    assert GATE.removeprefix("text_model.") in loaded(config, checkpoint).vlm.text_model.state_dict()
    damage(checkpoint)
    with pytest.raises(ValueError, match=rf"--model\.name {checkpoint}: .*weights {said}") as error:
        load_trunk_weights(replace(config, model_name=str(checkpoint)))
    assert is_mistake(error.value)


def test_weights_of_another_architecture_are_refused(config, checkpoint):
    wider = json.loads(json.dumps(config.vlm))
    wider["text_config"]["intermediate_size"] = 512
    with pytest.raises(RuntimeError, match=r"size mismatch for vlm\.text_model\.layers\.0\.mlp\.gate_proj\.weight"):
        loaded(replace(config, vlm=wider), checkpoint)
    with pytest.raises(RuntimeError, match=r"Missing key.*vlm\.text_model\.layers\.6\."):
        loaded(replace(config, num_trunk_layers=8), checkpoint)


def test_building_a_trunk_leaves_its_config_alone(config):
    before = json.dumps(config.vlm)
    small = Trunk(replace(config, num_trunk_layers=2))
    Expert(replace(config, num_trunk_layers=2))
    assert len(small.vlm.text_model.layers) == 2
    assert json.dumps(config.vlm) == before


def test_weights_have_the_configured_type(config):
    assert {p.dtype for p in Trunk(config).parameters()} == {torch.float32}
    assert {p.dtype for p in Trunk(replace(config, torch_dtype="bfloat16")).parameters()} == {torch.bfloat16}


def test_the_unused_part_of_the_last_layer_needs_no_gradient(config):
    frozen = {name for name, p in Trunk(config).named_parameters() if not p.requires_grad}
    parts = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert frozen == {f"vlm.text_model.layers.3.{part}.weight" for part in [*parts, "post_attention_layernorm"]}


def test_trunk_location(tiny_vlm, tmp_path):
    assert trunk_location("tiny") == str(tiny_vlm)
    assert trunk_location(str(tiny_vlm)) == str(tiny_vlm)
    assert trunk_location("HuggingFaceTB/SmolVLM2-500M-Video-Instruct") == "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
    for directory in (tmp_path, tmp_path / "none"):  # an empty and a missing one
        with pytest.raises(ValueError, match=rf"--model\.name {directory}: no such directory, or no config\.json"):
            trunk_location(str(directory))


def test_a_local_directory_gives_the_config_of_the_preset(tiny_vlm):
    assert load_trunk_config(str(tiny_vlm), None) == load_trunk_config("tiny", None)


def test_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=rf"--model\.name {tmp_path} is a llama, the trunk must be a smolvlm"):
        load_trunk_config(str(tmp_path), None)


NOT_OBJECTS = [b"", b"[]", b"null", b"not json", b"\xff\xfe", b"[" * 100_000]
WRONG_CONFIGS = [
    {},
    {"model_type": 7},
    {"model_type": "no model"},
    *({"model_type": "smolvlm", part: value} for part in ("text_config", "vision_config") for value in (7, [], "text")),
    {"model_type": "smolvlm", "scale_factor": 0},
    *(
        {"model_type": "smolvlm", "text_config": {"model_type": "llama", name: value}}
        for name, value in [
            ("hidden_size", "128"),
            ("hidden_size", 127),
            ("num_attention_heads", 0),
            ("num_key_value_heads", 0),
            ("hidden_act", "no activation"),
            ("hidden_act", None),
            ("rope_parameters", {"rope_type": "no rotation"}),
            ("pad_token_id", 10**6),
            ("rms_norm_eps", float("nan")),
        ]
    ),
    {"model_type": "smolvlm", "text_config": {"model_type": "bert"}},
    {"model_type": "smolvlm", "text_config": {"model_type": "no model"}},
]


@pytest.mark.parametrize("content", [*NOT_OBJECTS, *WRONG_CONFIGS], ids=str)
def test_a_config_of_which_no_trunk_can_be_built_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as error:
        load_trunk_config(str(tmp_path), None)
    assert is_mistake(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "file, content, said",
    [
        ("tokenizer.json", None, "its tokenizer cannot be loaded"),
        ("tokenizer.json", "{}", "its tokenizer cannot be loaded: KeyError"),
        ("tokenizer.json", "[]", "its tokenizer cannot be loaded"),
        ("tokenizer.json", "not json", "its tokenizer cannot be loaded"),
        ("tokenizer_config.json", None, "pad_token None, needed are"),
        ("tokenizer_config.json", "{}", "pad_token None, needed are"),
        ("tokenizer_config.json", "[]", "its tokenizer cannot be loaded"),
        (
            "tokenizer_config.json",
            '{"pad_token": 7}',
            "its tokenizer cannot be loaded: TypeError Special token pad_token",
        ),
        ("tokenizer_config.json", '{"tokenizer_class": 7}', "its tokenizer cannot be loaded"),
    ],
)
def test_a_wrong_tokenizer_is_refused(tiny_vlm, tmp_path, file, content, said):
    shutil.copytree(tiny_vlm, tmp_path, dirs_exist_ok=True)
    assert load_trunk_tokenizer(str(tmp_path), None).pad_token
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=rf"--model\.name {tmp_path}: .*{said}") as error:
        load_trunk_tokenizer(str(tmp_path), None)
    assert is_mistake(error.value)
