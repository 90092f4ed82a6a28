"""What must be at the paths that a command is given, told from names alone, before anything heavy is imported. So is
what names no device.

A path states in its type what must be there, as a number states its range: `laq_ckpt: paths.Teacher`. The functions
that read these files call the same checks.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

ARTIFACT_NAME = "smolvla_shared_stage2_artifact"
TEACHER_FILE = "laq.safetensors"
ROBOTS = "robots"  # in a policy of several robots, the directory with that of each
MOST_NAMES = 20
HUB_ID = re.compile(r"[a-z0-9_][\w.-]*(/[a-z0-9_][\w.-]*)?", re.ASCII | re.IGNORECASE)
# As torch has them, of which there is one "cpu" and one "mps".
DEVICE = re.compile(r"cpu|mps|cuda(:(0|[1-9][0-9]{0,2}))?", re.ASCII)
# What a run writes before its config.json. If it is killed there, the directory is as good as new.
BEFORE_A_RUN = {".lock", "inputs.json", "inputs.json.tmp", "config.json.tmp"}


def found_in(directory: Path, pattern: str = "*") -> str:
    """What a message says about a directory that lacks something: the first names that it holds instead."""
    if not directory.is_dir():
        return "no such directory"
    names = sorted(path.name for path in directory.glob(pattern))
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    return f"{names[:MOST_NAMES]}{more}"


def check_dataset(root: Path) -> None:
    if not (root / "meta" / "info.json").is_file():
        raise ValueError(f"no LeRobotDataset at {root}: meta/info.json is missing (found: {found_in(root)})")


def check_teacher(path: Path, option: str = "the teacher") -> None:
    if path.suffix not in (".safetensors", ".pt"):
        raise ValueError(f"{option} {path}: expected a .safetensors file of this package or a .pt file of LAPA")
    if not path.is_file():
        raise ValueError(
            f"{option} {path}: no such file; pass LAPA's laq_openx.pt, or the .safetensors file that "
            f"`python -m smolvla_shared.teacher train` writes"
        )
    if path.suffix == ".safetensors" and not (manifest := path.with_suffix(".json")).is_file():
        raise ValueError(f"{option} {path}: {manifest.name} is missing beside it; the two belong together")


def check_artifact(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(f"a Stage 2 artifact is named by its weights, a .safetensors file, not {path}")
    for needed in (path, path.with_suffix(".json"), path.with_suffix(".tokenizer.json")):
        if not needed.is_file():
            raise ValueError(
                f"no Stage 2 artifact {path}: there is no {needed.name} of its three files; copy all of them"
            )


def is_directory(name: str) -> bool:
    """Whether a name can only be that of a directory, not a hub id."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1


def hub_place(name: str) -> tuple[str, str]:
    """The hub's repository and the directory in it that a name is of: ("me/policy", "robots/so100") or ("gpt2", "")"""
    match = re.fullmatch(rf"([^/]+/[^/]+)/({ROBOTS}/[^/]+)", name)
    return match.groups() if match else (name, "")


def check_hub_id(what: str, name: str) -> None:
    """Raise ValueError for a name that can only be that of a directory, which nobody has found."""
    if os.path.lexists(name):
        raise ValueError(f"no {what} {name}: it is no directory, but a file, or a link to nothing; pass a directory")
    repository, _ = hub_place(name)
    if is_directory(repository) or not HUB_ID.fullmatch(repository):
        raise ValueError(f"no {what} {name}: there is no such directory, and a hub id looks like owner/name")


def check_initial(name: str) -> None:
    if name.endswith(".safetensors"):
        check_artifact(Path(name))
    else:
        check_model("policy", name)


def check_model(what: str, name: str) -> None:
    if not Path(name).is_dir():
        check_hub_id(what, name)
    elif not (Path(name) / "config.json").is_file():
        raise ValueError(f"no {what} in {name}: config.json is missing, found {found_in(Path(name))}")


def check_labels(directory: Path) -> None:
    """Raise ValueError unless there are labels of any dataset."""
    if not any(directory.glob("*/cache.json")):
        raise no_labels(directory)


def no_labels(directory: Path) -> ValueError:
    there = sorted(path.name for path in directory.parent.glob("*/")) or "nothing"
    return ValueError(
        f"--label-cache: there are no labels at {directory} (in {directory.parent}: {there}); "
        "make them with `python -m smolvla_shared.teacher label`"
    )


def check_hub_dataset(name: str, option: str) -> None:
    if is_directory(name) or not HUB_ID.fullmatch(name) or (Path(name) / "meta" / "info.json").is_file():
        roots = option.replace("repo-ids", "roots")
        raise ValueError(f"{option} {name} is no hub id, which looks like owner/name: pass a directory as {roots}")


def check_file(path: Path, option: str) -> None:
    if not path.is_file():
        raise ValueError(
            f"{option} {path}: no such file (in {path.parent}: {found_in(path.parent, f'*{path.suffix}')})"
        )


def check_upload(path: Path) -> Path:
    """The weights of an artifact or a teacher, or the directory of a policy."""
    if (path / "config.json").is_file() or path.is_file():
        return path
    names = [f"{ARTIFACT_NAME}.safetensors", TEACHER_FILE]
    if weights := next((path / name for name in names if (path / name).is_file()), None):
        return weights
    found = found_in(path) if path.is_dir() else "no such file or directory"
    raise ValueError(
        f"{path} holds no policy (config.json), artifact ({names[0]}) or teacher ({names[1]}), found: {found}; a "
        "run has them in checkpoints/last/pretrained_model and artifacts"
    )


def check_place(path: Path, option: str) -> None:
    """Raise ValueError unless a directory can be made, or written to, and is no part of a dataset."""
    resolved = path.resolve()
    for place in (resolved, *resolved.parents):
        if (place / "meta" / "info.json").is_file():
            at = "is" if place == resolved else "is in"
            raise ValueError(f"{option} {path} {at} the dataset {place}, which would change: name another directory")
    there = next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        found = f"{there} is a file or a link to nothing"
        raise ValueError(f"{option} {path} cannot be a directory: {found}; name another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path} cannot be written: no permission in {there}; name another directory")


def check_policy(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no policy: config.json is missing (found: {found_in(path)})")


def check_policy_name(name: str, option: str, out: Path | None) -> None:
    """A directory, or a policy of the hub. out: where the command writes; None: beside the policy, if it has a place"""
    if Path(name).is_dir() or not re.fullmatch(r"[^/]+/[^/]+", hub_place(name)[0]):
        check_policy(Path(name))
    else:
        check_hub_id("policy", name)
        if out is None:
            raise ValueError(
                f"{option} {name} is no directory here; if it is a hub id, name a directory for the results: --out"
            )


def check_name(path: Path, option: str) -> None:
    """Raise ValueError for a path that a shell or a program has made of something else."""
    if odd := sorted({letter for letter in str(path) if ord(letter) < 32 or "\ud800" <= letter <= "\udfff"}):
        raise ValueError(f"{option} {str(path)!a} has {''.join(odd)!a} in its name: name another path")
    if path.parts and path.parts[0].startswith("~"):
        raise ValueError(f"{option} {path}: the shell has not replaced the ~, as after a =: write the directory out")


def check_device(name: str, option: str) -> None:
    """Raise ValueError for a name of no device. Whether this machine has it, run_processes.find_device tells."""
    if not DEVICE.fullmatch(name):
        raise ValueError(f"{option} {name!r} is no device: pass cpu, cuda, cuda:1 (the second GPU) or mps")


def check_new(path: Path, option: str) -> None:
    if path.exists():
        raise ValueError(f"{option} {path} exists: name a new directory")
    check_place(path, option)


def check_run_dir(run_dir: Path, resume: bool) -> None:
    check_place(run_dir, "--run-dir")
    if resume and not (run_dir / "config.json").is_file():
        raise ValueError(f"--resume: there is no run at {run_dir} (no config.json); start without --resume")
    killed = run_dir.is_dir() and {path.name for path in run_dir.iterdir()} <= BEFORE_A_RUN
    if not resume and run_dir.exists() and not killed:
        raise ValueError(f"--run-dir {run_dir} exists: pass --resume to go on with it, or another directory")


@dataclass(frozen=True)
class Place:
    """What must be at a path, as metadata of its type. check(the path, its option, all options of the command)"""

    check: Callable[[Any, str, Any], Any]


Dataset = Annotated[Path, Place(lambda path, option, options: check_dataset(path))]
DatasetName = Annotated[str, Place(lambda name, option, options: check_dataset(Path(name).expanduser()))]
HubDataset = Annotated[str, Place(lambda name, option, options: check_hub_dataset(name, option))]
Teacher = Annotated[Path, Place(lambda path, option, options: check_teacher(path, option))]
Artifact = Annotated[Path, Place(lambda path, option, options: check_artifact(path))]
Initial = Annotated[str, Place(lambda name, option, options: check_initial(name))]
Trunk = Annotated[str, Place(lambda name, option, options: check_model("trunk", name))]
Labels = Annotated[Path, Place(lambda path, option, options: check_labels(path))]
File = Annotated[Path, Place(lambda path, option, options: check_file(path, option))]
Upload = Annotated[Path, Place(lambda path, option, options: check_upload(path))]
Device = Annotated[str, Place(lambda name, option, options: check_device(name, option))]
Policy = Annotated[Path, Place(lambda path, option, options: check_policy(path))]
PolicyName = Annotated[str, Place(lambda name, option, options: check_policy_name(name, option, options.out))]
NewDirectory = Annotated[Path, Place(lambda path, option, options: check_new(path, option))]
Directory = Annotated[Path, Place(lambda path, option, options: check_place(path, option))]
RunDirectory = Annotated[Path, Place(lambda path, option, options: check_run_dir(path, options.resume))]


def check(config: Any, options: Any = None, prefix: str = "--") -> None:
    """Raise ValueError for the first path of a dataclass of options, and of those in it, that lacks what must be there.

    options: the command's, of which `config` is a part
    """
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        value, option = getattr(config, field.name), prefix + field.name.replace("_", "-")
        _check(hints[field.name], value, option, options or config)


def _check(hint: Any, value: Any, option: str, options: Any) -> None:
    origin, arguments = get_origin(hint), get_args(hint)
    if value is None:
        return
    if isinstance(value, Path):
        check_name(value, option)
    if is_dataclass(value):
        check(value, options, f"{option}.")
    elif origin is Annotated:
        for place in hint.__metadata__:
            if isinstance(place, Place):
                place.check(value, option, options)
        _check(arguments[0], value, option, options)
    elif origin in (Union, UnionType):
        for argument in arguments:
            _check(argument, value, option, options)
    elif origin is tuple and arguments[-1] is ...:
        for item in value:
            _check(arguments[0], item, option, options)
