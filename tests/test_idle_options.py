"""Options without effect, as far as the data or the weights tell; test_mistakes.py has those of the options alone."""

from dataclasses import replace

import pytest
from helpers import make_config

from smolvla_shared.config import LATENT, DataConfig, ModelConfig, PolicyDataConfig
from smolvla_shared.data import open_datasets
from smolvla_shared.data_rows import group_rows
from smolvla_shared.data_split import split_datasets, unused_evaluation
from smolvla_shared.initial import open_initial
from train_stage2 import Stage2Config

TINY = ModelConfig(preset="tiny")


def test_a_vision_tower_of_a_frozen_trunk_does_not_train():
    initial = open_initial(TINY)
    pretrained = replace(initial, core=replace(initial.core, model_name="me/trunk"))
    own = {"latent_vector_dim": 32, "code_seq_len": 4}
    initial.build(ModelConfig(freeze_vision=False), ("top",), [LATENT], **own)
    for model in (ModelConfig(freeze_vision=False), ModelConfig(freeze_vision=False, freeze_trunk=True)):
        with pytest.raises(ValueError, match=r"--model.freeze-vision False has no effect, .*freeze-trunk False"):
            pretrained.build(model, ("top",), [LATENT], **own)
    pretrained.build(ModelConfig(freeze_vision=False, freeze_trunk=False), ("top",), [LATENT], **own)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_state_that_no_dataset_has_is_not_hidden(image_dataset, video_dataset, laq_checkpoint, tmp_path, is_there):
    data = PolicyDataConfig(roots=(video_dataset if is_there else image_dataset,), state_dropout=0.5)
    config = Stage2Config(run_dir=tmp_path, data=data, model=TINY, laq_ckpt=laq_checkpoint)
    ask = open_initial(TINY).choose_views, config, open_datasets(data), True
    if is_there:
        ask[0](*ask[1:])
    else:
        with pytest.raises(ValueError, match=r"--data.state-dropout 0.5 has no effect without a dataset with observ"):
            ask[0](*ask[1:])


def test_an_evaluation_that_will_not_be_is_said(video_dataset, tmp_path):
    """Of 8 episodes none is held out, unless --val-fraction asks for it."""
    datasets = open_datasets(DataConfig(roots=(video_dataset,)))

    def line(eval_every: int, **options) -> str:
        config = make_config(tmp_path, eval_every=eval_every, **options)
        _, held_out = split_datasets(datasets, config.val_fraction, config.seed)
        return unused_evaluation(config, group_rows(held_out))

    assert line(eval_every=5).startswith("--eval-every 5 has no effect: nothing is held out, since without --val-frac")
    assert line(1000) == line(eval_every=5, val_fraction=0.2) == ""
