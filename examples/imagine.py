"""What Stage 2 expects to happen: the latent actions that it predicts, decoded on the present frame.

    python examples/imagine.py --stage2-artifact runs/s2/artifacts/smolvla_shared_stage2_artifact.safetensors \
        --laq-ckpt runs/laq/checkpoints/last/pretrained_model/laq.safetensors --data.roots my/videos --out imagined.png

A row of the picture is a frame of another episode, of the first label camera. Its columns: the frame at t; what the
teacher's decoder makes of it with the predicted latent actions, one after the other; the frame that was recorded then;
and, beside either, its difference to the frame at t, four times as large. Take episodes that Stage 2 has not seen.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from smolvla_shared.command import run_command
from smolvla_shared.config import LATENT, PolicyDataConfig

if TYPE_CHECKING:
    from torch import Tensor

    from smolvla_shared.config import CoreConfig
    from smolvla_shared.data import RobotDataset
    from smolvla_shared.initial import InitialWeights
    from smolvla_shared.laq import LAQ
    from smolvla_shared.preprocess import Preprocessor


@dataclass(frozen=True, kw_only=True)
class ImagineConfig:
    """Draw what the core of a Stage 2 artifact expects, beside what happened."""

    # Weights file (.safetensors) of the Stage 2 artifact.
    stage2_artifact: Path
    # The teacher whose latent actions it has learned.
    laq_ckpt: Path
    # Recordings, and how they are read.
    data: PolicyDataConfig
    # The robot that they are of, by its name in Stage 2's data. Needed if Stage 2 has read the states of several.
    robot: str | None = None
    # The picture.
    out: Path
    # Rows of the picture.
    rows: int = 6
    # Which frames are drawn, and the noise that latent actions are generated from, are functions of it.
    seed: int = 0


def roll_forward(laq: "LAQ", frames: "Tensor", latents: "Tensor") -> "Tensor":
    """Frames [B, 3, H, W] in [0, 1] after M latent actions in a row [B, M, S, D], each decoded on the frame before."""
    import torch

    for latent in latents.unbind(1):
        frames = laq.reconstruct(torch.stack([frames, frames], dim=1), latent).clamp(0, 1)
    return frames


def make_preprocessor(
    core: "CoreConfig", initial: "InitialWeights", datasets: "list[RobotDataset]", robot: str | None
) -> "Preprocessor":
    """The artifact's preprocessor, with its statistics of this robot's state.

    Raises ValueError if the artifact is of several robots, and the datasets are of none of them.
    """
    from smolvla_shared.data import STATE_KEY
    from smolvla_shared.preprocess import Preprocessor
    from smolvla_shared.robot_preprocessor import RobotsPreprocessor
    from smolvla_shared.robots import Robots

    of = {name.removeprefix("state of "): one for name, one in initial.statistics.items() if " of " in name}
    if robot not in (of or (None,)):
        names = f"those of {', '.join(of)}" if of else "of a robot without a name, leave --robot out"
        raise ValueError(f"--robot {robot or 'is not given'}: the states that {initial.name} has learned are {names}")
    if not of:
        return Preprocessor(core, initial.tokenizer, initial.statistics)
    width = len(of[robot].mean)
    for dataset in datasets:
        if dataset.vector_dim(STATE_KEY) not in (0, width):
            found = dataset.vector_dim(STATE_KEY)
            raise ValueError(f"--robot {robot}: its state has {width} dimensions, that of {dataset.name} has {found}")
    robots = Robots((robot,) * len(datasets), {"state": {robot: width}})
    return RobotsPreprocessor(core, initial.tokenizer, initial.statistics | {"state": of[robot]}, robots)


def main(config: ImagineConfig) -> None:
    if config.out.exists():
        raise ValueError(f"--out {config.out} exists: name another file")
    import numpy as np
    import torch

    from smolvla_shared import data, data_views
    from smolvla_shared.config import ModelConfig
    from smolvla_shared.data_loader import SampleDataset, SampleSpec
    from smolvla_shared.data_order import SampleKey
    from smolvla_shared.initial import open_initial
    from smolvla_shared.label_pictures import draw_transfer
    from smolvla_shared.labels import OnlineLabels
    from smolvla_shared.laq_files import load_laq
    from smolvla_shared.model import SmolVLASharedCore
    from smolvla_shared.preprocess import nearest_codes, normalize_codebook, unit_range

    initial, laq = open_initial(ModelConfig(), config.stage2_artifact), load_laq(config.laq_ckpt)
    options = initial.data_options(config.data, with_latents=True)
    datasets = data.open_datasets(options)
    cameras, label_cameras = data_views.choose_cameras(datasets, options)
    labels = OnlineLabels(laq, initial.latents.teacher_kind, label_cameras, initial.latent_horizon)
    initial.latent_dims(labels, options, label_cameras)  # refuses another teacher, gap or camera
    core = SmolVLASharedCore(replace(initial.core, cameras=cameras)).eval()
    preprocess = make_preprocessor(core.config, initial, datasets, config.robot)
    core.load_state_dict(initial.weights)

    # A frame of each of some episodes, with all its pairs.
    rng, keys = np.random.default_rng(config.seed), []
    for index, dataset in enumerate(datasets):
        reach = dataset.gap * labels.horizon
        for start, end in zip(dataset.episode_from, dataset.episode_to):
            if end - start > reach:
                keys.append(SampleKey(0, len(keys), index, int(rng.integers(start, end - reach))))
    if not keys:
        raise ValueError(f"no episode is longer than {labels.horizon} x {options.gap_s:.3g} s: nothing to imagine")
    keys = [keys[place] for place in rng.permutation(len(keys))[: config.rows]]
    spec = SampleSpec.of(core.config, [LATENT], labels, features={})
    raw = SampleDataset(datasets, spec, config.seed)[keys]
    batch = preprocess(raw, labels(raw))
    predicted, statistics = core.sample(batch, LATENT, batch.targets[LATENT].noise[:, 0]), initial.statistics[LATENT]
    if labels.kind == "quantized":
        codes = nearest_codes(predicted, normalize_codebook(labels.codebook, len(predicted[0]), statistics))
        latents = labels.codebook[codes]
    else:
        latents = statistics.unnormalize(predicted.flatten(1)).view(predicted.shape)
    frames = laq.resize(unit_range(raw.pairs[:, 0]))
    first, last = frames[:, 0], frames[:, -1]
    with torch.no_grad():
        in_a_row = latents.unflatten(1, (labels.horizon, len(label_cameras), -1))[:, :, 0]
        expected = roll_forward(laq, first, in_a_row)
    columns, ahead = {"t": first}, labels.horizon * options.gap_s
    for title, images in {"expected": expected, "recorded": last}.items():
        columns |= {f"{title}, t + {ahead:.3g} s": images, f"{title} change, x 4": 0.5 + 4 * (images - first)}
    draw_transfer(config.out, columns)
    print(f"{config.out}: {len(keys)} frames, {labels.horizon} latent action(s) ahead")


if __name__ == "__main__":
    run_command(main, ImagineConfig)
