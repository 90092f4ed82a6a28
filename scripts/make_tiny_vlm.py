"""Regenerates smolvla_shared/assets/tiny_vlm: architecture and tokenizer of the preset `tiny`, a SmolVLM for a CPU.

    python scripts/make_tiny_vlm.py

The files are those of a SmolVLM directory on the hub without the weights, so that everything that reads one
(transformers, LeRobot's SmolVLA, our own trunk) reads this one. The tokenizer is a byte-level BPE: any text encodes
without unknowns, and the words of robot instructions are one token each. Same versions, same files.
"""

from itertools import product
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

VOCAB_SIZE = 1024
IMAGE_SIZE, PATCH_SIZE, SCALE_FACTOR = 64, 8, 2
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE // SCALE_FACTOR) ** 2  # 16

# SmolVLM's special tokens, first in the vocabulary.
UNKNOWN, BEGIN, PAD, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>"
FAKE_IMAGE, IMAGE, GLOBAL_IMAGE = "<fake_token_around_image>", "<image>", "<global-img>"
SPECIAL_TOKENS = [UNKNOWN, BEGIN, PAD, FAKE_IMAGE, IMAGE, GLOBAL_IMAGE, END]

VERBS = """
    open close press push pull pick grasp grab lift lower raise place put drop insert remove unplug plug slide
    sweep turn rotate twist lock unlock reach touch move hold release stack unstack fold unfold pour wipe hang
    hammer kick dunk throw catch flip fill empty cover uncover take get bring give carry hand load unload sort
    stir tighten loosen bypass assemble disassemble point follow start stop avoid rotating turning holding
    opening closing
""".split()
OBJECTS = """
    door drawer window button handle lever faucet dial peg puck block cube box nut screw hammer mug cup plate
    bowl bottle can basketball ball soccer stick shelf cabinet table wall bin basket hole goal lid cover towel
    cloth shirt spoon fork knife pan pot stove oven microwave fridge sink lamp light switch book pen marker
    drill cable ring tray rack apple banana orange lemon carrot bread cheese egg toy bear car train tower
    gripper robot arm hand finger object thing position place side top bottom corner edge middle center coffee
    machine lock joint
""".split()
MODIFIERS = """
    red green blue yellow black white orange pink purple brown gray wooden metal plastic glass small big large
    tall short round square left right upper lower front back first second third other another same near far
    full empty open closed revolving hot cold heavy light
""".split()
RELATIONS = """
    in into on onto to toward from out of off under above over below behind beside between with without along
    across around through against inside outside next near at by using
""".split()
MANNERS = """
    clockwise counter-clockwise sideways up down forward backward left right slowly carefully gently quickly
    twice again together apart firmly halfway fully
""".split()
NUMBERS = "0 1 2 3 4 5 6 7 8 9 10 45 90 180 360 one two three four five all both each".split()


def corpus() -> list[str]:
    """Instructions from a few templates; the verbs stand both first and within a sentence."""
    sentences = [f"{verb} the {thing}" for verb, thing in product(VERBS, OBJECTS)]
    sentences += [f"the {how} {thing}" for how, thing in product(MODIFIERS, OBJECTS)]
    sentences += [f"place it {where} a {thing}" for where, thing in product(RELATIONS, OBJECTS)]
    sentences += [f"{verb} it {manner}, then wait." for verb, manner in product(VERBS, MANNERS)]
    sentences += [f"turn it {number} degrees and {verb} it" for number, verb in product(NUMBERS, VERBS)]
    return sentences + [sentence.capitalize() for sentence in sentences]


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    # Digits one by one, as in SmolVLM: numbers then need no tokens of their own.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        # These become attributes of the tokenizer, fake_image_token_id and so on, which SmolVLM's users read.
        extra_special_tokens={
            "fake_image_token": FAKE_IMAGE,
            "image_token": IMAGE,
            "global_image_token": GLOBAL_IMAGE,
            "end_of_utterance_token": END,
        },
        padding_side="right",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> SmolVLMConfig:
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    width = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    # transformers builds each sub-model in its own config's dtype: all three say float32.
    vision = SmolVLMVisionConfig(**width, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, dtype=torch.float32)
    text = LlamaConfig(
        **width,
        **ids,
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        dtype=torch.float32,
    )
    return SmolVLMConfig(
        **ids,
        vision_config=vision,
        text_config=text,
        scale_factor=SCALE_FACTOR,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        dtype=torch.float32,
        architectures=["SmolVLMForConditionalGeneration"],
    )


def main(directory: Path) -> None:
    tokenizer = make_tokenizer()
    make_config(tokenizer).save_pretrained(directory)
    side = {"longest_edge": IMAGE_SIZE}
    SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(size=side, max_image_size=side, do_image_splitting=False),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(
            size=side, max_image_size=side, video_sampling={"fps": 1, "max_frames": 8, "video_size": side}
        ),
        image_seq_len=IMAGE_TOKENS,
    ).save_pretrained(directory)


if __name__ == "__main__":
    main(Path(__file__).parent.parent / "smolvla_shared" / "assets" / "tiny_vlm")
