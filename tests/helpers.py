"""Shared by several test modules: a module small enough to train by hand, the smallest real model, comparisons."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from smolvla_shared import run_processes
from smolvla_shared.config import DataConfig, ModelConfig, OptimConfig, RunConfig
from smolvla_shared.losses import masked_mean, valid_tokens
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.run import Inputs, Run
from smolvla_shared.trunk_files import make_core_config

if TYPE_CHECKING:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from smolvla_shared.data import RobotDataset

NOT_REPEATABLE = "time/"


def make_config(run_dir: Path, **options) -> RunConfig:
    warmup = min(2, options.get("steps", 4))
    defaults = {
        "data": DataConfig(roots=("x",)),
        "steps": 4,
        "batch_size": 8,
        "log_every": 1,
        "eval_every": 100,
        "save_every": 100,
        "optim": OptimConfig(lr=1e-2, warmup_steps=warmup, weight_decay=0.1, max_grad_norm=14.0),
    }
    run_dir.mkdir(exist_ok=True)
    return RunConfig(run_dir=run_dir, **defaults | options)


def make_accelerator() -> Accelerator:
    return run_processes.make_accelerator(cpu=True, step_scheduler_with_optimizer=False)


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(NOT_REPEATABLE)} for line in lines]


# --- a module small enough to train by hand ---------------------------------------------------------------------------


@dataclass
class Points:
    """Two regression targets, of which masks hide many values: [B, 3] -> [B, 5] and [B, 2]."""

    x: Tensor
    y: dict[str, Tensor]
    masks: dict[str, Tensor]
    keys: list[str]
    dataset: list[int]  # alternately the first and the second


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.heads = nn.ModuleDict({"a": nn.Linear(3, 5), "b": nn.Linear(3, 2)})
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, batch: Points) -> dict[str, Tensor]:
        return {name: (head(self.frozen(batch.x)) - batch.y[name]).square() for name, head in self.heads.items()}


def points(step: int) -> Points:
    """The 8 samples of a step. The masks are uneven: of "a" a sample has 0 to 5 valid values, of "b" most have none."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, generator=generator)
    y = {"a": torch.randn(8, 5, generator=generator), "b": torch.randn(8, 2, generator=generator)}
    masks = {"a": torch.arange(5) < torch.randint(0, 6, (8, 1), generator=generator), "b": torch.zeros(8, 2) > 0}
    masks["b"][step % 8] = True
    return Points(x, y, masks, [f"step {step} slot {slot}" for slot in range(8)], [0, 1] * 4)


def passes(first_step: int, process: int = 0, num_processes: int = 1, accumulation_steps: int = 1) -> Iterator[Points]:
    """The forward passes of one process, dealt as StepSampler deals them."""
    size = 8 // (num_processes * accumulation_steps)
    step = first_step
    while True:
        whole = points(step)
        for number in range(accumulation_steps):
            start = (number * num_processes + process) * size
            part = slice(start, start + size)
            y, masks = ({name: value[part] for name, value in of.items()} for of in (whole.y, whole.masks))
            yield Points(whole.x[part], y, masks, whole.keys[part], whole.dataset[part])
        step += 1


def train(
    config: RunConfig,
    accelerator: Accelerator,
    module: nn.Module,
    make_batches: Callable[[int], Any],
    *,
    prepare: Callable[[Any], Any] = lambda raw: raw,
    weight: dict[str, float] | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    after_step: Callable[[int], dict[str, float]] = lambda step: {},
    export: Callable[[Path, dict[str, Tensor], int], None] | None = None,
    resume_from: Path | None = None,
    inputs: Inputs | None = None,
) -> dict[str, Tensor]:
    """The loop of the scripts; returns the weights to publish.

    after_step: called after every update; what it returns is logged
    """
    with Run(config, accelerator, module, resume_from, export, inputs) as run:
        for raws in run.steps(make_batches):
            batches = [prepare(raw) for raw in raws]
            counts = valid_tokens(batches, accelerator)
            run.mark("preprocess")
            for batch in run.passes(batches):
                errors = run.core(batch)
                parts = {name: masked_mean(errors[name], batch.masks[name], counts[name]) for name in errors}
                run.backward(sum((weight or {}).get(name, 1.0) * part for name, part in parts.items()))
                run.record(parts, errors, batch.masks)
            run.update()
            run.log(after_step(run.step))
            if evaluate and run.evaluates:
                with run.evaluation():
                    run.log(evaluate())
    return run.weights()


def train_points(config: RunConfig, accelerator: Accelerator | None = None, **options) -> Regression:
    """Train a Regression on the points; its loss is a + 0.3 b."""
    accelerator = accelerator or make_accelerator()
    split = accelerator.process_index, accelerator.num_processes, config.accumulation_steps
    module = options.pop("module", None) or Regression()
    make_batches = options.pop("make_batches", lambda step: passes(step, *split))
    weights = train(config, accelerator, module, make_batches, **{"weight": {"b": 0.3}} | options)
    assert bool(weights) == accelerator.is_main_process
    if weights:
        module.load_state_dict(weights)
    return module


# --- the real model ---------------------------------------------------------------------------------------------------


def make_core(**dims) -> SmolVLASharedCore:
    torch.manual_seed(0)
    dims = {"state_dim": 4, "latent_vector_dim": 32, "code_seq_len": 4} | dims
    return SmolVLASharedCore(make_core_config(ModelConfig(preset="tiny"), ("observation.image",), **dims))


# --- data -------------------------------------------------------------------------------------------------------------


def set_vectors(root: Path, vectors: dict[str, np.ndarray]) -> None:
    """Write other values of vector features, [rows, A], into the one parquet file of a recorded dataset."""
    (path,) = root.glob("data/*/*.parquet")
    table = pq.read_table(path)
    for key, values in vectors.items():
        place = table.schema.get_field_index(key)
        field = table.schema.field(place)
        table = table.set_column(place, field, pa.array(values.tolist(), field.type))
    pq.write_table(table, path)
    (root / "meta" / "stats.json").unlink()  # which would contradict the rows


def lerobot_dataset(dataset: "RobotDataset", **options) -> "LeRobotDataset":
    """A recording as LeRobot reads it."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset(dataset.name, root=dataset.root, **options)


# --- comparing --------------------------------------------------------------------------------------------------------


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def equal(one, other) -> bool:
    """Equal to the bit, through dictionaries and lists; a saved tuple comes back as a list."""
    if isinstance(one, Tensor):
        same_kind = one.dtype == other.dtype and one.shape == other.shape
        # torch.equal finds no NaN equal to itself.
        return same_kind and (
            torch.equal(one, other) or one.numpy(force=True).tobytes() == other.numpy(force=True).tobytes()
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other))
    return one == other


# --- pictures ---------------------------------------------------------------------------------------------------------

BITS = 8


def bars(number: int, width: int, height: int) -> np.ndarray:
    """A picture that tells a number: a bar for each bit, the lowest at the left. The lower third is red."""
    columns = np.arange(width) * BITS // width
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:] = np.where(number >> columns & 1, 255, 0)[None, :, None]
    picture[2 * height // 3 :] = (250, 20, 20)
    return picture


def read_bars(picture: np.ndarray) -> int:
    """The number of a picture [h, w, 3]; it must stand upright."""
    height, width = picture.shape[:2]
    assert np.abs(picture[5 * height // 6, width // 2].astype(int) - (250, 20, 20)).max() < 30
    return sum(
        int(picture[height // 3, (2 * bit + 1) * width // (2 * BITS)].mean() > 128) << bit for bit in range(BITS)
    )


def drawn_figures(monkeypatch) -> dict[str, Any]:
    """The matplotlib figures that are saved from now on, by the name of their file."""
    from matplotlib.figure import Figure

    figures, save = {}, Figure.savefig

    def savefig(figure: Figure, path: Path, **options: Any) -> None:
        figures[Path(path).name.removesuffix(".tmp")] = figure
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures
