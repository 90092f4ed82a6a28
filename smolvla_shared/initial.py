"""What training starts from. Whatever it is, it becomes the same thing here: `InitialWeights`.

--stage2-artifact X, --init-from X.safetensors      a Stage 2 artifact
--init-from <directory or hub id>                   a policy of this project, or a SmolVLA policy of LeRobot's
neither                                             the trunk's own weights, under a fresh expert
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from smolvla_shared import (
    data,
    data_outliers,
    data_values,
    data_views,
    idle_options,
    lerobot_files,
    lerobot_smolvla_files,
    ranges,
)
from smolvla_shared.artifact import Latents, load_artifact
from smolvla_shared.batch import Labels
from smolvla_shared.config import (
    ACTION,
    LATENT,
    CoreConfig,
    DataConfig,
    ModelConfig,
    NormalizationMode,
    PolicyDataConfig,
    StageOptions,
)
from smolvla_shared.files import check_weights, find_directory, public_state, state_sha256
from smolvla_shared.hashes import json_sha256
from smolvla_shared.labels import labels_pairs, latent_statistics
from smolvla_shared.mixture import camera_names
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.model_parts import PARTS, frozen_parts, parameter_table, parameters_by_part, prepare_to_train
from smolvla_shared.normalization import EPS, Statistics
from smolvla_shared.refusals import read_json, refuse_differences
from smolvla_shared.trunk_files import load_trunk_tokenizer, load_trunk_weights, make_core_config, pack_tokenizer

HEADS = ("latent head", "action head")  # the parts that any initial weights may leave out


def difference(recorded: Statistics, artifact: Statistics) -> str:
    """In words, how far the data's statistics are from an artifact's, and whether they are of another mode."""
    if len(recorded.mean) != len(artifact.mean):
        return f"the data has {len(recorded.mean)} dimensions, the artifact {len(artifact.mean)}"
    rows = zip(recorded.mean, artifact.mean, artifact.std, strict=True)
    shift = max(abs(mean - other_mean) / (other_std + EPS) for mean, other_mean, other_std in rows)
    other = f", which is normalised by {artifact.mode}" if recorded.mode != artifact.mode else ""
    return f"the data's mean is up to {shift:.2f} standard deviations from the artifact's{other}"


@dataclass(frozen=True)
class InitialWeights:
    """A model to start from, with all that belongs to it."""

    # What it is, in words, with the name that the user gave.
    name: str
    # Its configuration. What depends on the data (cameras, state_dim, ...) is replaced by the data's. Of the cameras,
    # only those that observations must have.
    core: CoreConfig
    weights: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerFast
    # Parts (model.PARTS) that are initialised at random where the weights have nothing of them.
    may_be_fresh: tuple[str, ...] = HEADS
    # Statistics it was trained with, by "state", "action" and "latent"; and why there are none, if there are none.
    statistics: dict[str, Statistics] = field(default_factory=dict)
    no_statistics: str = ""
    # The latent actions that its latent head has learned, where that is known.
    latents: Latents | None = None
    # For the JSON file beside the weights that are trained from it.
    provenance: dict[str, Any] = field(default_factory=dict)
    # Tensors of its file that no action depends on.
    left_out: tuple[str, ...] = ()

    def data_options[Data: DataConfig](self, options: Data, with_latents: bool) -> Data:
        """The data options, with the model's own cameras, label camera and frame gap where the user names none.

        To the model a camera is its place in the order: the cameras that the user names take the places in turn. Of the
        names in a mixture, those that are the model's own keep their places, and the others take the rest.
        """
        options = replace(options, cameras=options.cameras or self.mapped_cameras(options)[0])
        if not (self.latents and with_latents):
            return options
        return replace(
            options,
            label_cameras=options.label_cameras or self.label_cameras(options),
            frame_gap_s=options.frame_gap_s or self.latents.frame_gap_s,
        )

    def mapped_cameras(self, options: DataConfig) -> tuple[tuple[str, ...], dict[str, str]]:
        """The policy's cameras where the user names none but in a mixture, and the names that its own cameras take."""
        mapped, own = camera_names(options.mixture_entries), self.core.cameras
        if not mapped:
            return own, dict(zip(own, own))
        new = iter([camera for camera in mapped if camera not in own])
        places = [camera if camera in mapped else next(new, None) for camera in own]
        named = (*filter(None, places), *new)
        return named, {camera: place for camera, place in zip(own, places) if place}

    def choose_views(
        self, config: StageOptions, datasets: list[data.RobotDataset], with_latents: bool
    ) -> tuple[PolicyDataConfig, tuple[str, ...], tuple[str, ...]]:
        """The data options with nothing left out, the policy's cameras, and the label cameras (() without latents).
        Sets the frame gap.

        Raises ValueError where the options contradict the labels or these weights, or the data lacks a camera.
        """
        has_state = any(data.STATE_KEY in dataset.features for dataset in datasets)
        ranges.refuse_without(config.data, has_state, f"a dataset with {data.STATE_KEY}", "state_dropout", "--data.")
        entries = [dataset.entry for dataset in datasets]
        options = labels_pairs(config, self.data_options(config.data, with_latents), entries)
        data.set_frame_gap(datasets, options.gap_s)
        return options, *data_views.choose_cameras(datasets, options, bool(config.data.cameras), with_latents)

    def label_cameras(self, options: DataConfig) -> tuple[str, ...]:
        """The cameras that its latent actions are of, under their names in the data; () where that is not known."""
        if self.latents is None:
            return ()
        named, names = self.mapped_cameras(options)
        if options.cameras != named:
            names = dict(zip(self.core.cameras, options.cameras))
        return tuple(names.get(camera, camera) for camera in self.latents.label_cameras)

    @property
    def sha256(self) -> str:
        """Of all that training takes of it. A policy that LeRobot's commands saved records none of its own."""
        statistics = {name: asdict(found) for name, found in self.statistics.items()}
        about = asdict(self.core), pack_tokenizer(self.tokenizer), statistics
        return json_sha256([state_sha256(self.weights), *about])

    @property
    def latent_horizon(self) -> int:
        """Latent actions in a row that its latent head predicts; 1 where it has none."""
        return self.latents.horizon if self.latents else 1

    def latent_dims(
        self,
        labels: Labels,
        options: DataConfig,
        label_cameras: tuple[str, ...],
        head: str | None = None,
        datasets: Sequence[data.RobotDataset] = (),
    ) -> dict[str, int]:
        """The fields of CoreConfig that give a core a latent head (--latent-head) for these labels.

        datasets: of the run, if these are more than the options'

        Raises ValueError where its own latent head has learned other latent actions, and for a head that classifies
        codes where the labels are none.
        """
        own_head = "codes" if self.core.codebook_size else "flow"
        head = head or own_head
        if head == "codes" and labels.kind != "quantized":
            raise ValueError(
                f"the latent head of {self.name} classifies codes, --teacher-kind {labels.kind} has none: "
                "use --teacher-kind quantized"
            )
        if self.latents:
            known = {self.latents.frame_gap_s, *self.latents.own_gaps_s}
            entries = [dataset.entry for dataset in datasets] or options.entries
            other = {entry.frame_gap_s or options.gap_s for entry in entries} - known
            refuse_differences(
                f"{self.name} has learned other latent actions",
                [
                    ("teacher (--laq-ckpt)", labels.teacher_id, self.latents.teacher_id),
                    ("--teacher-kind", labels.kind, self.latents.teacher_kind),
                    ("--data.frame-gap-s", min(other, default=self.latents.frame_gap_s), self.latents.frame_gap_s),
                    ("--data.label-cameras", " ".join(label_cameras), " ".join(self.label_cameras(options))),
                    ("--latent-horizon", labels.horizon, self.latents.horizon),
                    ("--latent-head", head, own_head),
                ],
                found="artifact",
            )
        code_seq_len, latent_dim = labels.shape
        dims = {"latent_vector_dim": code_seq_len * latent_dim, "code_seq_len": code_seq_len}
        return dims | {"codebook_size": len(labels.codebook) if head == "codes" else 0}

    def latent_statistics(self, labels: Labels, *of: Any) -> Statistics:
        """Those of the latents that its latent head has learned, or of these labels (of: as labels.latent_statistics).

        They stay as they are wherever training goes on: with others, the head's latents would mean others.
        """
        return latent_statistics(labels, *of, recorded=self.statistics.get(LATENT))

    def normalization_mode(self, options: StageOptions) -> NormalizationMode:
        """--normalization-mode: where it is not stated, that of its own state or actions."""
        own = [found.mode for name, found in self.statistics.items() if name != LATENT]
        return options.normalization_mode or (own[0] if own else "mean_std")

    def recorded_statistics(self, dims: dict[str, int]) -> dict[str, Statistics]:
        """Its statistics of state and action, for data of these widths (CoreConfig's fields; state_dim 0: no state).

        Raises ValueError where it has none, or has them for other widths.
        """
        if self.no_statistics:
            raise ValueError(f"--normalization artifact: {self.no_statistics}: use --normalization data")
        widths = {"state": dims["state_dim"], ACTION: dims["action_dim"]}
        recorded = {name: self.statistics[name] for name in widths if name in self.statistics}
        rows = [(name, widths[name], len(found.mean)) for name, found in recorded.items()]
        if "state" not in recorded and (widths["state"] or not recorded):
            rows.append(("state", widths["state"], "none"))
        refuse_differences(
            f"--normalization artifact: {self.name} was trained on other vectors (use --normalization data)",
            rows,
            asked="dimensions in the data",
            found="in the artifact",
        )
        return recorded

    def build(
        self,
        model: ModelConfig,
        cameras: tuple[str, ...],
        targets: Collection[str],
        precision: str | None = "no",
        **dims: int,
    ) -> SmolVLASharedCore:
        """A core to train on these targets, with what --model freezes frozen. It is float32, but for a frozen trunk
        under precision bf16.

        precision: Accelerate's mixed precision
        dims:      the data-dependent fields of CoreConfig

        Raises ValueError for missing, unknown and misshapen weights. Only whole parts of `may_be_fresh` may be missing.
        """
        config = replace(self.core, cameras=cameras, torch_dtype="float32", **dims)
        idle_options.check_freezing(model, config.has_pretrained_trunk)
        if precision == "bf16" and "language layers" in frozen_parts(model, config, targets):
            config = replace(config, torch_dtype="bfloat16")
        core = SmolVLASharedCore(config)
        fresh = tuple(PARTS[part] for part in self.fresh_parts(core))
        expected = {name: w for name, w in public_state(core.state_dict()).items() if not name.startswith(fresh)}
        check_weights(self.name, expected, self.weights)
        core.load_state_dict(self.weights, strict=not fresh)
        prepare_to_train(core, model, targets)
        return core

    def fresh_parts(self, core: SmolVLASharedCore) -> list[str]:
        """The parts of a core that these weights have nothing of: they are initialised at random."""
        absent = [part for part in self.may_be_fresh if not any(key.startswith(PARTS[part]) for key in self.weights)]
        return [part for part in absent if part in parameters_by_part(core)]

    def describe(
        self,
        core: SmolVLASharedCore,
        statistics: dict[str, Statistics] | None = None,
        datasets: Sequence[data.RobotDataset] = (),
        recorded: dict[str, Statistics] | None = None,
    ) -> str:
        """What a core that was built from it starts from, for the first lines of a run.

        statistics: the data's, of state and actions; that of the state is compared with its own
        datasets:   what it will be trained on; what the core reads of them in another way than they may seem is said
        recorded:   its own statistics that are used instead
        """
        cameras = core.config.cameras
        pairs = zip_longest(cameras, self.core.cameras[: len(cameras)] or cameras, fillvalue="one more")
        places = ", ".join(camera if camera == place else f"{camera} as {place}" for camera, place in pairs)
        unread = f"; left out, nothing reads them: {', '.join(self.left_out)}" if self.left_out else ""
        lines = [
            f"from {self.name}; cameras {places}; freshly initialised: {', '.join(self.fresh_parts(core)) or 'nothing'}"
            + unread,
            parameter_table(core),
        ]
        statistics = statistics or {}
        if "state" in statistics and "state" in self.statistics:
            lines.append(f"state statistics: {difference(statistics['state'], self.statistics['state'])}")
        modes = {name: of.mode for name, of in (statistics | (recorded or {})).items()}
        lines += [f"normalised: {', '.join(f'{name} by {mode}' for name, mode in modes.items())}"] if modes else []
        lines += data_values.texts_cut(datasets, self.tokenizer, core.config.max_text_tokens)
        lines += data_values.without_text(datasets)
        read = {data.STATE_KEY: core.config.state_dim, data.ACTION_KEY: core.config.action_dim}
        lines += data_outliers.unusual(datasets, [key for key, width in read.items() if width])
        lines += data_values.chunk_cost(datasets, core.config.chunk_size if core.config.action_dim else 0)
        return "\n".join(lines)


def open_initial(model: ModelConfig, stage2_artifact: Path | None = None) -> InitialWeights:
    """The initial weights that the options name, read and verified.

    Raises ValueError where there is nothing of that name, it is damaged, or the --model options contradict it.
    """
    name = stage2_artifact or model.init_from
    if name is None:
        return _of_trunk(model)
    if stage2_artifact or str(name).endswith(".safetensors"):
        initial = _of_artifact(Path(name))
    else:
        config = find_directory("policy", name, ("config.json",)) / "config.json"
        is_ours = read_json(config).get("type") == lerobot_files.POLICY_TYPE
        initial = _of_policy(str(name)) if is_ours else _of_smolvla(str(name))
        initial = replace(initial, provenance=initial.provenance | {"sha256": initial.sha256})
    stated = {"model_name": model.stated_name, "model_revision": model.revision}
    refuse_differences(
        f"the command line contradicts {initial.name} (leave these options out to take its values)",
        [(field, value, asdict(initial.core)[field]) for field, value in stated.items() if value is not None],
        found="artifact",
    )
    return initial


def _of_trunk(model: ModelConfig) -> InitialWeights:
    config = make_core_config(model, cameras=())
    return InitialWeights(
        name=f"the trunk's own weights ({config.model_name})",
        core=config,
        weights=load_trunk_weights(config) if config.has_pretrained_trunk else {},
        tokenizer=load_trunk_tokenizer(config.model_name, config.model_revision),
        may_be_fresh=("expert", "state projection", *HEADS) if config.has_pretrained_trunk else tuple(PARTS),
        no_statistics="training starts from a trunk, which has no statistics",
    )


def _of_artifact(path: Path) -> InitialWeights:
    artifact = load_artifact(path)
    manifest = artifact.manifest
    several = [name for name in manifest.normalization if name.startswith("state of ")]
    return InitialWeights(
        name=f"{path} ({manifest.source.run} step {manifest.source.global_step})",
        core=manifest.core,
        weights=artifact.state_dict,
        tokenizer=artifact.tokenizer,
        may_be_fresh=("action head",),  # Stage 2 has always trained the latent head
        statistics=manifest.normalization,
        no_statistics=f"{path} has statistics of several robots, {', '.join(several)}" if several else "",
        latents=manifest.latents,
        provenance={
            "stage2_artifact": manifest.weights.sha256,
            "stage2": asdict(manifest.source) | {"latents": asdict(manifest.latents)},
        },
    )


def _of_policy(name: str) -> InitialWeights:
    saved = lerobot_files.load_saved(name)
    core, optional = saved.config.core, saved.config.optional_cameras
    try:
        statistics, problem = saved.statistics, ""
    except ValueError as error:  # only needed with --normalization artifact
        statistics, problem = {}, f"{name}: {error}"
    if saved.config.relative_actions:
        problem = f"{name} has learned relative actions, with statistics of their chunks"
    return InitialWeights(
        name=f"the policy {name}" + " of relative actions" * saved.config.relative_actions,
        core=replace(core, cameras=tuple(camera for camera in core.cameras if camera not in optional)),
        weights=saved.weights,
        tokenizer=saved.tokenizer,
        statistics=statistics,
        no_statistics=problem,
        provenance={"policy": name, "started_from": saved.source},
    )


def _of_smolvla(name: str) -> InitialWeights:
    checkpoint = lerobot_smolvla_files.load_checkpoint(name)
    try:
        statistics, problem = checkpoint.normalization(), ""
    except ValueError as error:  # only needed with --normalization artifact
        statistics, problem = {}, str(error)
    return InitialWeights(
        name=f"the SmolVLA policy {name}",
        core=replace(checkpoint.core, cameras=checkpoint.cameras),
        weights=checkpoint.weights,
        tokenizer=checkpoint.tokenizer,
        statistics=statistics,
        no_statistics=problem,
        provenance={"smolvla": name},
        left_out=checkpoint.unread,
    )
