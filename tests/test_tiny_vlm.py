"""The shipped preset `tiny` is what its script writes, and stands in for SmolVLM."""

import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, SmolVLMForConditionalGeneration


def test_script_regenerates_the_shipped_files(tiny_vlm, tmp_path):
    runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "make_tiny_vlm.py"))["main"](tmp_path)
    shipped = {path.name: path.read_text() for path in tiny_vlm.iterdir()}
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == shipped


@pytest.mark.parametrize("text", ["Slide a plate into a cabinet\n", "Größe 漢字 🤖\t42\x00", ""])
def test_any_text_encodes_and_decodes(tiny_vlm, text):
    tokenizer = AutoTokenizer.from_pretrained(tiny_vlm)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_config_agrees_with_the_tokenizer(tiny_vlm):
    config, tokenizer = AutoConfig.from_pretrained(tiny_vlm), AutoTokenizer.from_pretrained(tiny_vlm)
    text = config.text_config
    assert text.vocab_size == len(tokenizer)
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert (text.pad_token_id, text.bos_token_id, text.eos_token_id) == ids
    assert config.image_token_id == tokenizer.image_token_id == tokenizer.convert_tokens_to_ids("<image>")


def test_is_a_small_smolvlm_in_float32(tiny_vlm):
    vlm = SmolVLMForConditionalGeneration(AutoConfig.from_pretrained(tiny_vlm)).eval()
    assert sum(p.numel() for p in vlm.parameters()) < 5_000_000
    assert {p.dtype for p in vlm.parameters()} == {torch.float32}
    patches = vlm.model.vision_model(torch.zeros(1, 3, 64, 64)).last_hidden_state
    assert vlm.model.connector(patches).shape == (1, 16, 128)
