"""A LAQ in files: ours (.safetensors with a .json beside it) and LAPA's .pt, read strictly."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smolvla_shared import paths
from smolvla_shared.config import DataConfig
from smolvla_shared.files import (
    check_weights,
    public_state,
    read_sealed,
    read_weights,
    sealed,
    state_sha256,
    write_text,
    write_weights,
)
from smolvla_shared.hashes import file_sha256, json_sha256
from smolvla_shared.laq import LAQ
from smolvla_shared.laq_config import SECOND_CONV, LAQConfig, slots_of_grid
from smolvla_shared.mixture import DatasetEntry, policy_names
from smolvla_shared.refusals import refuse_differences
from smolvla_shared.teacher_config import GroundedIn

SCHEMA = "smolvla_shared.laq.v1"


@dataclass(frozen=True)
class Weights:
    sha256: str
    tensors: int
    parameters: int


@dataclass(frozen=True)
class Manifest:
    """The .json beside a teacher's weights."""

    config: LAQConfig
    weights: Weights
    teacher_id: str
    # What its training used (run.origin, frame gap, label cameras, grounding); {}: not recorded.
    source: dict[str, Any] = field(default_factory=dict)
    kind: str = "laq"
    schema_version: str = SCHEMA


def teacher_id(laq: LAQ) -> str:
    """sha256 of the config and the public weights. Teachers with the same id give the same labels.

    The config is included because image_size changes the labels without changing a weight.
    """
    return json_sha256([asdict(laq.config), state_sha256(public_state(laq.state_dict()))])


def save_laq(laq: LAQ, path: Path, extra: dict[str, Any] | None = None) -> None:
    """Write `path` (.safetensors) and a .json beside it: config, hash of the weights, and `extra` as "source"."""
    tensors = public_state(laq.state_dict())
    weights = Weights(write_weights(path, tensors), len(tensors), sum(tensor.numel() for tensor in tensors.values()))
    manifest = Manifest(laq.config, weights, teacher_id(laq), extra or {})
    write_text(path.with_suffix(".json"), sealed(asdict(manifest)))


def teachers_source(path: Path) -> dict[str, Any]:
    """What the .json beside a teacher records of its training; {} for LAPA's files."""
    paths.check_teacher(path)
    return read_manifest(path).source if path.suffix == ".safetensors" else {}


def teachers_grounding(path: Path | None) -> GroundedIn | None:
    """What the teacher in a file was grounded in. None: there is no file, no grounding, or it is one of LAPA's."""
    found = teachers_source(path).get("grounding") if path else None
    if not found:
        return None
    used = found["datasets"]
    return GroundedIn(tuple(used), sum(len(of["episodes"]) for of in used.values()), found["weight"])


def teachers_pairs[Data: DataConfig](
    path: Path, data: Data, accept_other: bool = False, entries: Sequence[DatasetEntry] = ()
) -> Data:
    """The data options; frame gap and label camera that they leave out are those that the teacher was trained on.

    entries: of all datasets of the run, if these are more than the options'

    LAPA's files record neither. Raises ValueError if the options, or datasets of a mixture, state others, unless
    `accept_other`. Some of the teacher's cameras are no other ones.
    """
    source = teachers_source(path)
    gap, cameras = source.get("frame_gap_s"), policy_names(data.entries, source.get("label_cameras", ()))
    if not accept_other:
        of_mixture = source.get("of_mixture", {})
        gaps, seen = {gap, *of_mixture.get("frame_gap_s", ())}, {*cameras, *of_mixture.get("label_cameras", ())}
        seen |= {*source.get("label_cameras", ())}
        rows = [("--data.frame-gap-s", data.frame_gap_s, gap)] if gap and data.frame_gap_s else []
        if cameras and not {*data.label_cameras} <= {*cameras}:
            rows.append(("--data.label-cameras", " ".join(data.label_cameras), " ".join(cameras)))
        for entry in entries or data.entries:
            if gap and entry.frame_gap_s and entry.frame_gap_s not in gaps:
                rows.append((f"frame_gap_s of {entry.name}", entry.frame_gap_s, gap))
            if cameras and not {*(entry.label_cameras or ())} <= seen:
                rows.append((f"label_cameras of {entry.name}", " ".join(entry.label_cameras), " ".join(cameras)))
        refuse_differences(
            f"{path} was trained on other pairs",
            rows,
            found="teacher",
            fix="Leave these options out, or pass --accept-other-pairs",
        )
    return replace(data, frame_gap_s=data.frame_gap_s or gap, label_cameras=data.label_cameras or cameras)


def load_laq(path: Path, code_seq_len: int | None = None, image_size: int | None = None) -> LAQ:
    """A frozen LAQ in eval mode, on the CPU, from our .safetensors or LAPA's .pt.

    LAPA's files do not record the image size (default 256). S follows from the image size and the weights' shapes.
    Raises ValueError if an argument contradicts the file, or a key or shape does not match.
    """
    paths.check_teacher(path)
    if path.suffix == ".pt":
        state = read_lapa(path)
        config = infer_config(path, state, code_seq_len, image_size)
    else:
        manifest = read_manifest(path)
        config = manifest.config
        for option, given, found in [
            ("--laq-code-seq-len", code_seq_len, config.code_seq_len),
            ("--laq-image-size", image_size, config.image_size),
        ]:
            if given not in (None, found):
                raise ValueError(
                    f"{option} {given}, but {path.with_suffix('.json')} says {found}: leave the option out"
                )
        if (sha256 := file_sha256(path)) != manifest.weights.sha256:
            raise ValueError(
                f"{path} has sha256 {sha256}, but {path.with_suffix('.json').name} says {manifest.weights.sha256}: "
                "the file was changed or cut short, copy both again"
            )
        state = read_weights(path)
    with torch.device("meta"):
        laq = LAQ(config)
    check_weights(str(path), expected=public_state(laq.state_dict()), found=state)
    return assemble_laq(config, state).requires_grad_(False).eval()


def read_lapa(path: Path) -> dict[str, Tensor]:
    """The tensors of LAPA's .pt. Raises ValueError if it holds anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of torch's, by what the file holds: code in it does not run
        raise ValueError(f"{path} is no weights file of LAPA ({type(error).__name__}): copy it again") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected tensors by name: save the LAQ's state_dict")
    others = {key: tensor for key, tensor in state.items() if not (isinstance(key, str) and isinstance(tensor, Tensor))}
    if others:
        found = ", ".join(f"{key} ({type(value).__name__})" for key, value in others.items())
        raise ValueError(f"{path} holds other things beside tensors: {found}: save the LAQ's state_dict alone")
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}  # DDP's prefix


def assemble_laq(config: LAQConfig, state: dict[str, Tensor]) -> LAQ:
    """A LAQ that holds these weights themselves, not copies. Its private buffers are those of a fresh LAQ."""
    with torch.device("meta"):
        laq = LAQ(config)
    shapes = {key: tensor for key, tensor in laq.state_dict().items() if key not in public_state(state)}
    private = {
        key: torch.full(like.shape, torch.nan if like.is_floating_point() else 0, dtype=like.dtype)
        for key, like in shapes.items()
    }
    laq.load_state_dict(public_state(state) | private, assign=True)
    return laq


def read_manifest(path: Path) -> Manifest:
    """The .json beside our .safetensors, read strictly. Raises ValueError if it is missing, or its fields are wrong."""
    paths.check_teacher(path)
    manifest = read_sealed(Manifest, path.with_suffix(".json"), SCHEMA)
    if "label_camera" in manifest.source:  # it would be ignored, and another camera labelled
        raise ValueError(
            f"{path.with_suffix('.json')} names one label_camera, {manifest.source['label_camera']}, where "
            "label_cameras are read: an older version wrote it, train the teacher again"
        )
    return manifest


def infer_config(path: Path, state: dict[str, Tensor], code_seq_len: int | None, image_size: int | None) -> LAQConfig:
    """The config of LAPA's weights, from their shapes and two options. Raises ValueError if these contradict."""

    def shape(key: str, dimensions: int) -> torch.Size:
        if key not in state:
            raise ValueError(f"{path}: {key} is missing; this is not a LAQ checkpoint of LAPA")
        found = state[key].shape
        if len(found) != dimensions:
            raise ValueError(f"{path}: {key} has shape {[*found]}, a LAQ's has {dimensions} dimensions: copy it again")
        return found

    def depth(transformer: str) -> int:
        return len({m[1] for key in state if (m := re.match(rf"{transformer}\.layers\.(\d+)\.", key))})

    dim, pixels = shape("to_patch_emb_first_frame.2.weight", 2)
    heads, _, dim_head = shape("enc_spatial_transformer.layers.0.1.null_kv", 3)
    codebook_size, quant_dim = shape("vq.codebooks", 2)
    patch_size = round((pixels / 3) ** 0.5)
    image_size = image_size or LAQConfig.image_size
    kernel = tuple(shape("vq.cnn_encoder.2.weight", 4)[2:]) if "vq.cnn_encoder.2.weight" in state else None
    candidates = [S for S, conv in SECOND_CONV.items() if (conv and conv[0]) == kernel]
    if code_seq_len is None:  # the kernel leaves at most two candidates, of which a grid of patches fits only one
        fitting = [S for S in candidates if slots_of_grid(S, image_size // max(patch_size, 1)) == S]
        code_seq_len = fitting[0] if fitting else candidates[0] if candidates else LAQConfig.code_seq_len
    if code_seq_len not in candidates:
        raise ValueError(
            f"--laq-code-seq-len {code_seq_len}, but the slot CNN of {path} has a second kernel of {kernel}, "
            f"which is that of {' or '.join(map(str, candidates)) or 'no known code_seq_len'}"
        )
    try:
        return LAQConfig(
            dim=dim,
            quant_dim=quant_dim,
            codebook_size=codebook_size,
            image_size=image_size,
            patch_size=patch_size,
            spatial_depth=depth("enc_spatial_transformer"),
            temporal_depth=depth("enc_temporal_transformer"),
            dim_head=dim_head,
            heads=heads,
            code_seq_len=code_seq_len,
        )
    except ValueError as error:
        raise ValueError(
            f"{path} does not go with --laq-image-size {image_size}, --laq-code-seq-len {code_seq_len} "
            f"(given or default): {error}"
        ) from error
