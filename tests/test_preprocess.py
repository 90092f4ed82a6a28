"""Preprocessing against LeRobot's own, numpy, and what a reader can work out."""

from dataclasses import replace

import pytest
import torch
from lerobot.policies.common.vla_utils import resize_with_pad as lerobot_resize_with_pad
from lerobot.processor import (
    NewLineTaskProcessorStep,
)
from transformers import AutoTokenizer

from smolvla_shared import preprocess
from smolvla_shared.batch import RawBatch
from smolvla_shared.config import CoreConfig
from smolvla_shared.initial import difference
from smolvla_shared.normalization import Statistics
from smolvla_shared.preprocess import Preprocessor, TextTokenizer

TASKS = ["open the door", "push the red button, then wait.\n", "slide"]


@pytest.fixture(scope="module")
def tokenizer(tiny_vlm):
    return AutoTokenizer.from_pretrained(tiny_vlm)


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (37, 101), (101, 37), (32, 32), (64, 64), (480, 640)])
def test_resize_with_pad_is_lerobots(shape):
    images = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    expected = lerobot_resize_with_pad(images, 64, 64, pad_value=0)
    assert torch.equal(preprocess.resize_with_pad(images, 64), expected)


def test_padding_is_on_the_left_and_on_top():
    wide, tall = torch.ones(1, 3, 32, 64), torch.ones(1, 3, 64, 32)
    assert torch.equal(preprocess.resize_with_pad(wide, 64)[0, 0, :, 0], (torch.arange(64) >= 32).float())
    assert torch.equal(preprocess.resize_with_pad(tall, 64)[0, 0, 0, :], (torch.arange(64) >= 32).float())


def test_prepare_images_maps_bytes_and_shares_alike():
    images = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prepared = preprocess.prepare_images(images, 64)
    assert (prepared.shape, prepared.dtype) == ((2, 3, 64, 64), torch.float32)
    assert torch.equal(prepared, preprocess.prepare_images(images.float() / 255, 64))
    torch.testing.assert_close(prepared[:, :, 16:], images / 127.5 - 1)
    assert (prepared[:, :, :16] == -1).all()  # padding is black


def test_a_missing_camera_is_black_and_masked():
    image = torch.rand(2, 3, 8, 8)
    stacked, mask = preprocess.stack_cameras([None, image, None])
    assert torch.equal(stacked[:, 1], image)
    assert (stacked[:, [0, 2]] == -1).all()
    assert mask.tolist() == [[False, True, False]] * 2


# --- text -------------------------------------------------------------------------------------------------------------


def test_tokenizer_is_lerobots_pipeline(tokenizer):
    ids, mask = TextTokenizer(tokenizer, 48)(TASKS)
    lined = NewLineTaskProcessorStep().complementary_data({"task": TASKS})["task"]
    expected = tokenizer(lined, padding="longest", padding_side="right", max_length=48, return_tensors="pt")
    longest = expected["input_ids"].shape[1]
    assert torch.equal(ids[:, :longest], expected["input_ids"])
    assert torch.equal(mask[:, :longest], expected["attention_mask"].bool())
    assert not mask[:, longest:].any()


def test_every_task_ends_with_one_newline(tokenizer):
    ids, mask = TextTokenizer(tokenizer, 48)([*TASKS, "slide\n"])
    texts = [tokenizer.decode(row[valid]) for row, valid in zip(ids, mask, strict=True)]
    assert texts == ["open the door\n", "push the red button, then wait.\n", "slide\n", "slide\n"]


@pytest.mark.parametrize(("max_tokens", "padded"), [(48, 16), (50, 9)])
def test_short_texts_are_padded_on_the_right_to_few_lengths(tokenizer, max_tokens, padded):
    """To a multiple of 16, unless the longest texts would then be too long."""
    ids, mask = TextTokenizer(tokenizer, max_tokens)(TASKS)
    lengths = mask.sum(1)
    assert lengths.max() == 9 and ids.shape == mask.shape == (3, padded)
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)
    assert torch.equal(mask, torch.arange(ids.shape[1]) < lengths[:, None])
    assert (ids[~mask] == tokenizer.pad_token_id).all()
    assert len(lengths.unique()) == 3


def test_long_texts_are_cut_at_the_end(tokenizer):
    ids, mask = TextTokenizer(tokenizer, 5)(["open the door and close the window and open the drawer"])
    assert ids[0].tolist() == tokenizer("open the door and close the window")["input_ids"][:5]
    assert mask.all()


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_pad_width_adds_zeros_on_the_right():
    assert preprocess.pad_width(torch.tensor([[1.0, 2.0]]), 4).tolist() == [[1, 2, 0, 0]]


# --- the whole --------------------------------------------------------------------------------------------------------

CONFIG = CoreConfig(
    model_name="tiny",
    model_revision=None,
    vlm={},
    cameras=("top", "wrist"),
    image_size=16,
    state_dim=2,
    max_state_dim=5,
    latent_vector_dim=6,
    code_seq_len=2,
    action_dim=2,
    max_action_dim=4,
    chunk_size=3,
)
STATISTICS = {
    "state": Statistics((1.0, 2.0), (2.0, 4.0)),
    "action": Statistics((0.0, 10.0), (1.0, 5.0)),
    "latent": Statistics((0.0, 1.0, 2.0, 3.0, 4.0, 5.0), (1.0, 2.0, 1.0, 2.0, 1.0, 2.0)),
}


def make_raw_batch() -> RawBatch:
    """Two samples; the second has no state, its pair crosses the episode's end, and so does its action chunk."""
    return RawBatch(
        images=[torch.full((2, 3, 12, 16), 255, dtype=torch.uint8), torch.full((2, 3, 16, 16), 0.5)],
        image_mask=torch.tensor([[True, True], [True, True]]),
        tasks=["open the door", "slide"],
        state=torch.tensor([[3.0, 10.0], [7.0, 7.0]]),
        state_mask=torch.tensor([True, False]),
        pairs=None,
        pair_mask=torch.tensor([[True], [False]]),
        actions=torch.tensor([[[1.0, 15.0]] * 3, [[0.0, 5.0]] * 3]),
        action_mask=torch.tensor([[True, True, True], [True, False, False]]),
        noise={"latent": torch.zeros(2, 4, 2, 3), "action": torch.ones(2, 4, 3, 4)},
        time={"latent": torch.zeros(2, 4), "action": torch.ones(2, 4)},
        dataset=[0, 0],
        row=[0, 1],
        keys=["a", "b"],
    )


def test_preprocessor_makes_a_batch(tokenizer):
    latents = torch.arange(12.0).view(2, 2, 3)
    batch = Preprocessor(CONFIG, tokenizer, STATISTICS)(make_raw_batch(), latents)

    assert (batch.images.shape, batch.images.dtype) == ((2, 2, 3, 16, 16), torch.float32)
    assert (batch.images[:, 0, :, 4:] == 1).all() and (batch.images[:, 0, :, :4] == -1).all()
    assert (batch.images[:, 1] == 0).all()
    assert batch.image_mask.tolist() == [[True, True]] * 2
    assert torch.equal(batch.text, TextTokenizer(tokenizer, 48)(["open the door", "slide"])[0])
    assert not batch.text_mask[1].all()

    assert batch.state.tolist() == [[1, 2, 0, 0, 0], [0, 0, 0, 0, 0]]  # nothing of a state that is not there
    assert batch.state_mask.tolist() == [True, False]

    latent, action = batch.targets["latent"], batch.targets["action"]
    torch.testing.assert_close(latent.value[0], torch.zeros(2, 3))  # the statistics' mean
    torch.testing.assert_close(latent.value[1], torch.tensor([[5.0, 3, 5], [3, 5, 3]]))  # 6 is clipped at 5
    assert latent.mask.tolist() == [[True, True], [False, False]]
    torch.testing.assert_close(action.value[0], torch.tensor([[1.0, 1, 0, 0]] * 3))
    torch.testing.assert_close(action.value[1], torch.tensor([[0.0, -1, 0, 0]] * 3))
    assert action.mask.tolist() == [[True, True, True], [True, False, False]]
    assert action.noise.mean() == 1 and latent.noise.mean() == 0 and action.time.mean() == 1 and latent.time.mean() == 0


def test_latents_are_clipped_on_both_sides_and_nothing_else_is(tokenizer):
    raw = make_raw_batch()
    raw.actions = raw.actions + 1e3
    latents = torch.tensor([[-1e3, 1e3, 0.0]]).expand(2, 2, 3)
    targets = Preprocessor(CONFIG, tokenizer, STATISTICS)(raw, latents).targets
    assert (targets["latent"].value[..., 0] == -5).all() and (targets["latent"].value[..., 1] == 5).all()
    assert targets["action"].value.max() > 100


def test_targets_are_those_with_noise(tokenizer):
    raw = make_raw_batch()
    del raw.noise["latent"]
    assert list(Preprocessor(CONFIG, tokenizer, STATISTICS)(raw).targets) == ["action"]
    raw.noise.clear()
    assert Preprocessor(CONFIG, tokenizer, {"state": STATISTICS["state"]})(raw).targets == {}


def test_a_model_without_state_gets_zeros(tokenizer):
    raw = replace(make_raw_batch(), state=torch.zeros(2, 0), state_mask=torch.zeros(2, dtype=torch.bool), noise={})
    batch = Preprocessor(replace(CONFIG, state_dim=0), tokenizer, {})(raw)
    assert torch.equal(batch.state, torch.zeros(2, 5))
    assert not batch.state_mask.any()


def test_statistics_say_how_far_they_are_from_the_artifacts():
    data, artifact = Statistics((1.0, 2.0), (1.0, 1.0)), Statistics((1.0, 5.0), (1.0, 2.0))
    assert "up to 1.50 standard deviations" in difference(data, artifact)
    assert "the data has 2 dimensions, the artifact 1" in difference(data, Statistics((0.0,), (1.0,)))
