"""The Stage 2 -> Stage 3 artifact, schema smolvla_shared.v1: save, load, refuse.

Three files side by side, `<name>.safetensors` (weights), `<name>.json` (manifest) and `<name>.tokenizer.json`. The
manifest alone rebuilds the model; nothing is unpickled and no hub is asked. Every mismatch is a ValueError that names
the field, what was expected, what was found, and the fix.
"""

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from smolvla_shared import files, ranges
from smolvla_shared.config import CoreConfig, TeacherKind
from smolvla_shared.model_parts import PARTS
from smolvla_shared.normalization import Quantiles, Statistics
from smolvla_shared.paths import ARTIFACT_NAME, check_artifact
from smolvla_shared.refusals import ADDED_LATER
from smolvla_shared.teacher_config import GroundedIn, in_words
from smolvla_shared.trunk_files import pack_tokenizer, unpack_tokenizer

SCHEMA = "smolvla_shared.v1"


@dataclass(frozen=True)
class Latents:
    """Where the latent targets came from."""

    teacher_id: str  # sha256 of the teacher's configuration and weights (laq_files.teacher_id)
    teacher_kind: TeacherKind
    frame_gap_s: ranges.Positive  # of the datasets that state none of their own, if there are such (data_views.gaps)
    label_cameras: tuple[str, ...]
    # Share of the sampled pairs that did not cross an episode's end.
    valid_pair_share: ranges.Share
    # Latent actions in a row that the latent head predicts.
    horizon: ranges.Count = 1
    # Verdict of `teacher check` on the labels (label_health.py), and its reasons where it is "fail" and was accepted.
    health: Literal["pass", "fail", "not measured"] = "not measured"
    health_reasons: tuple[str, ...] = ()
    # Of a mixture whose datasets have their own: the other gaps; and the label cameras by dataset, as it names them.
    own_gaps_s: tuple[ranges.Positive, ...] = ()
    own_label_cameras: dict[str, tuple[str, ...]] = field(default_factory=dict)
    teacher_grounding: GroundedIn | None = field(default=None, metadata=ADDED_LATER)

    def __str__(self) -> str:
        return (
            f"{self.teacher_kind} latents of {in_words(self.teacher_id, self.teacher_grounding)} on "
            f"{', '.join(self.label_cameras)}, "
            f"{' or '.join(f'{gap:.3g}' for gap in (self.frame_gap_s, *self.own_gaps_s))} s apart, "
            f"{self.horizon} in a row; {self.valid_pair_share:.1%} of the frames have a pair; label health: "
            + (f"{self.health} (teacher check, --label-health)" if self.health == "not measured" else self.health)
        )


@dataclass(frozen=True)
class Origin:
    """The run that wrote the weights."""

    run: str
    global_step: int
    datasets: tuple[str, ...]
    # Parts of the model (model_parts.PARTS) whose weights differ from those at the run's start.
    changed_parts: tuple[str, ...]
    # Which weights: the EMA (--ema-decay), or those of the last step.
    weights: str
    versions: dict[str, str]
    backend: str = "smolvla_shared"
    training_mode: str = "latent_flow"


@dataclass(frozen=True)
class Weights:
    sha256: str
    num_tensors: int
    num_parameters: int


@dataclass(frozen=True)
class Manifest:
    core: CoreConfig
    normalization: dict[str, Statistics | Quantiles]  # by state, action, latent, where the run had them
    latents: Latents
    source: Origin
    weights: Weights
    tokenizer_sha256: str
    schema_version: str = SCHEMA


@dataclass(frozen=True)
class Artifact:
    manifest: Manifest
    state_dict: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerFast


def to_json(manifest: Manifest) -> str:
    """The manifest with a hash of itself, so that an edit by hand does not go unnoticed."""
    return files.sealed(asdict(manifest))


def read_manifest(path: Path) -> Manifest:
    """A manifest, read strictly. Raises ValueError for another schema, wrong fields, and an edit by hand."""
    return files.read_sealed(Manifest, path, SCHEMA, "artifact manifest")


def save_artifact(
    directory: Path,
    core: CoreConfig,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
    normalization: dict[str, Statistics],
    latents: Latents,
    source: Origin,
) -> Path:
    """Write the three files into `directory`, the manifest last; returns the path of the weights."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{ARTIFACT_NAME}.safetensors"
    tensors, packed_tokenizer = files.public_state(weights), pack_tokenizer(tokenizer)
    manifest = Manifest(
        core=core,
        normalization=normalization,
        latents=latents,
        source=source,
        weights=Weights(files.write_weights(path, tensors), len(tensors), sum(t.numel() for t in tensors.values())),
        tokenizer_sha256=hashlib.sha256(packed_tokenizer.encode()).hexdigest(),
    )
    files.write_text(path.with_suffix(".tokenizer.json"), packed_tokenizer)
    files.write_text(path.with_suffix(".json"), to_json(manifest))
    return path


def load_artifact(path: Path) -> Artifact:
    """Read and verify an artifact by the path of its weights.

    Raises ValueError for a missing file, another schema, an unknown, missing or edited manifest field, and weights or
    a tokenizer that are not the ones the manifest was written for.
    """
    check_artifact(path)
    manifest_path, tokenizer_path = path.with_suffix(".json"), path.with_suffix(".tokenizer.json")
    manifest = read_manifest(manifest_path)
    for file, expected in ((path, manifest.weights.sha256), (tokenizer_path, manifest.tokenizer_sha256)):
        if (found := files.file_sha256(file)) != expected:
            raise ValueError(
                f"{file}: sha256 is {found}, the manifest expects {expected}: the file is damaged or belongs to "
                "another artifact. Copy all three files again"
            )
    return Artifact(manifest, files.read_weights(path), unpack_tokenizer(tokenizer_path.read_text()))


def fingerprints(weights: dict[str, Tensor]) -> dict[str, str]:
    """A hash of the weights of each part (model.PARTS), to tell afterwards which parts a run has changed."""
    return {
        part: files.state_sha256({name: tensor for name, tensor in weights.items() if name.startswith(prefix)})
        for part, prefix in PARTS.items()
    }


def changed_parts(before: dict[str, str], weights: dict[str, Tensor]) -> tuple[str, ...]:
    """The parts whose fingerprints are no longer those from before."""
    return tuple(part for part, fingerprint in fingerprints(weights).items() if fingerprint != before[part])
