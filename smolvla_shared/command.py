"""How a command ends: a user's mistake with a few lines and exit code 2, a bug with its traceback.

A mistake is an error that this project raises itself, with a `raise` that says what was found and what to do. Whatever
comes from elsewhere, or from an expression, nobody has foreseen: it is a bug.
"""

import contextlib
import errno
import io
import linecache
import os
import re
import select
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from difflib import SequenceMatcher
from itertools import takewhile
from pathlib import Path
from typing import Any

import tyro

from smolvla_shared import launch, paths

EXIT_MISTAKE = 2  # as tyro's and argparse's
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
MOST_LINES, MOST_CHARACTERS = 4, 1000
# What a word processor or a web page makes of -- begins an option, too.
DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2212"
# Said of an option that LeRobot has for what cannot be had here.
NO_STREAMING = (
    "no dataset is streamed, its order could be neither repeated nor resumed (docs/data.md, Hub datasets): leave the "
    "option out, datasets are downloaded, and HF_LEROBOT_HOME names a larger disk"
)
NEAR = 0.6  # likeness of names from which on one is offered for the other; difflib's own
# The machine's refusals: the disk or the quota is full, or the directory is not the user's.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
WORKER_DIED = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (exited unexpectedly|is killed by signal: (?:Killed|Bus error))"
)
TOO_MANY = {errno.EMFILE, errno.ENFILE}
FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


def run_command(main: Callable[..., None], options: Any = None) -> None:
    """main(options from the command line), or main() if it reads its options itself (by `parse`).

    options: the dataclass that tyro makes of the command line
    """
    try:
        try:
            main(parse(options)) if options else main()
        finally:
            sys.stdout.flush()  # here, where it can be told that nobody reads it
        leave_processes()
    except SystemExit:  # of a run that was stopped, or had nothing left to do
        leave_processes()
        raise
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if mistake := error if is_mistake(error) else of_worker(error):
            said = in_few_lines(mistake)
        elif is_unread(error):
            said = "error: nobody reads the output any more, as after `| head`: write it to a file, or read all of it"
        elif not (said := of_machine(error)):
            raise
        with contextlib.suppress(BrokenPipeError):
            print(said, file=sys.stderr)
        sys.exit(EXIT_MISTAKE)


def is_unread(error: BaseException) -> bool:
    """Whether the error is that of standard output with nobody at the other end; from then on it goes nowhere."""
    if not isinstance(error, BrokenPipeError):
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # of a pipe without a reader POLLERR is said unasked
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
    return True


def leave_processes() -> None:
    """Leave the other processes of the run, if there are any: a process that ends while the threads of its process
    group still run is aborted, now and then, and the launcher takes its finished run for a failed one.
    """
    distributed = sys.modules.get("torch.distributed")  # importing it here would cost every command a second
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def parse(options: Any, **more: Any) -> Any:
    """tyro.cli(options, **more), with paths and an environment that fit; a refusal of the options' own comes back as it
    was raised, not in tyro's frame.
    """
    said, words = io.StringIO(), more.get("args") or sys.argv[1:]
    refuse_empty(words)
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(options, **more)
    except SystemExit as stop:
        error = stop.__context__
        while error and not is_mistake(error):
            error = error.__context__
        if error:
            raise error from None
        if stop.code != EXIT_MISTAKE:  # --help
            raise
        raise ValueError(unknown_options(options, more, words) or of_tyro(said.getvalue())) from None
    say_twice(words)
    paths.check(config)
    launch.check(config)
    return config


def refuse_empty(words: list[str]) -> None:
    """Raise ValueError for a value without a letter: a path of none would be the current directory. A task's text may
    be empty.
    """
    option = "the command line"
    for word in words:
        name, _, value = word.partition("=") if word.startswith("--") else (option, "", word)
        if (not word.startswith("--") or "=" in word) and name != "--task" and not value.strip():
            raise ValueError(
                f"{name} has an empty value, is a variable of the shell not set? Give it one, or leave it out"
            )
        option = name


def option_names(words: Iterable[str]) -> Iterator[tuple[str, str]]:
    """What a command line has of options: each as it was typed, and as it should look. Numbers below 0 are none."""
    for word in words:
        typed = word.partition("=")[0]
        if typed[:1] in DASHES and not re.fullmatch(r"-(\d.*|\.\d.*|inf|nan)", typed):
            yield typed, "--" + typed.lstrip(DASHES).replace("_", "-")


def known_options(options: Any, more: dict[str, Any], words: list[str]) -> list[str]:
    """The options of a command, as its --help lists them."""
    subcommand = [*takewhile(lambda word: word[:1] not in DASHES, words)]
    before, said = os.environ.get("COLUMNS"), io.StringIO()
    os.environ["COLUMNS"] = "1000"  # or names would be broken over lines
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
            tyro.cli(options, **more | {"args": [*subcommand, "--help"]})
    except SystemExit:
        pass
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    # At the left of a box, of which there may be several side by side.
    lines = re.findall(r"(?:^| {2}|[│|] )(--\w[\w.-]*(?:, --[\w.-]+)*)", said.getvalue(), re.M)
    return [name for line in lines for name in line.split(", ")]


def unknown_options(options: Any, more: dict[str, Any], words: list[str]) -> str:
    """A line for each option that a command does not have, with the nearest that it has; "": there is none."""
    if not (known := known_options(options, more, words)):
        return ""
    lines = []
    for typed, name in option_names(words):
        if typed in ("-h", "--help") or (name in known and typed.startswith("--")):
            continue
        if name.endswith("streaming"):  # LeRobot's
            lines.append(f"unknown option {typed}: {NO_STREAMING}")
            continue

        def likeness(other: str, name: str = name) -> float:
            """Of the names, or of the last part, which is what one remembers: --lr for --optim.lr."""
            pairs = [(name, other), (name.rpartition(".")[2].lstrip("-"), other.rpartition(".")[2].lstrip("-"))]
            return max(SequenceMatcher(None, *pair).ratio() - 0.01 * number for number, pair in enumerate(pairs))

        best = max(known, key=likeness)
        near = f"did you mean {best}" if likeness(best) > NEAR else "there is none of a similar name, --help lists all"
        lines.append(f"unknown option {typed}: {near}")
    return "\n".join(lines)


def say_twice(words: list[str]) -> None:
    """Say which options are given twice: as everywhere, the last one counts, so that a script's can be overridden."""
    counts = Counter(name for _, name in option_names(words))
    if (twice := [name for name, count in counts.items() if count > 1]) and os.environ.get("RANK", "0") == "0":
        print(f"given twice, the last one counts: {', '.join(twice)}", file=sys.stderr)


def of_tyro(panel: str) -> str:
    """What tyro says in a box about options that it cannot read, without the help texts: a line for each section."""
    said = []
    # The box is drawn in Unicode or, where standard output is ASCII, by dashes and spaces. Its title comes first.
    panel = re.sub(r"^[╭╰].*$", "─────", panel, flags=re.M).replace("│", " ")
    for section in re.split(r"^ *(?:─{5,}|-{5,}) *$", panel, flags=re.M)[1:]:
        lines = [line[2:].rstrip() for line in section.splitlines() if line.strip()]
        if not lines or lines[0].startswith("Argument helptext"):
            continue
        # An option stands behind up to four spaces, its help text behind more.
        options = [line.strip() for line in lines if line.startswith("  ") and not line.startswith(5 * " ")]
        text = [line for line in lines if not line.startswith("  ")]
        said.append(f"{' '.join(text)} {', '.join(options)}".strip())
    text = re.sub(r" \(applied to [^)]*\)| +Arguments are applied to .* matter\.", "", "\n".join(said))
    text = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"expected a whole number, got \1", text)
    return re.sub(r"could not convert string to float: (.*)", r"expected a number, got \1", text)


def is_mistake(error: BaseException) -> bool:
    # A loss that is not finite, which run.py raises as FloatingPointError, is mostly too high a learning rate.
    kinds = ValueError | OSError | ImportError | FloatingPointError
    if not isinstance(error, kinds) or error.__traceback__ is None:
        return False
    last = error.__traceback__
    while last.tb_next:
        last = last.tb_next
    module = last.tb_frame.f_globals.get("__name__", "")
    line = linecache.getline(last.tb_frame.f_code.co_filename, last.tb_lineno)
    is_ours = module == "__main__" or module.split(".")[0] in (
        "smolvla_shared",
        "train_stage2",
        "train_stage3",
        "rollout",
    )
    return is_ours and line.lstrip().startswith("raise ")


def of_worker(error: BaseException) -> ValueError | None:
    """The mistake that a worker of a DataLoader has found: torch raises its error again, with its traceback as text. Or
    that a worker is no more.
    """
    if found := WORKER_DIED.match(str(error)):
        return ValueError(
            f"a loader process {found[1]}: if it said nothing before, the system has killed it for want of memory\n"
            "Pass a smaller --data.num-workers or --batch-size; --resume goes on from a run's last checkpoint"
        )
    if not re.match(r"Caught \w+ in DataLoader worker process", str(error)):
        return None
    kind, traceback = type(error).__name__, str(error).rpartition("Traceback (most recent call last):\n")[2]
    *_, (file, line) = re.findall(r'^  File "(.+)", line \d+, in .+\n    (.+)$', traceback, re.M) or [("", "")]
    is_ours = Path(file).parent.name == __name__.partition(".")[0] and line.startswith("raise ")
    said = re.search(rf"^{kind}: (.*)", traceback, re.M | re.S)
    return ValueError(said[1].rstrip()) if said and is_ours else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or this machine has no memory left. torch is not imported here to ask for its class."""
    is_ram = isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
    is_ram = is_ram or getattr(error, "errno", None) == errno.ENOMEM
    return is_ram or type(error).__name__ == "OutOfMemoryError"


def of_machine(error: BaseException) -> str:
    """What the machine refuses, and what to do; "": the error is another one."""
    text, number = str(error).partition("\n")[0], getattr(error, "errno", None)
    if is_out_of_memory(error):
        return f"error: out of memory: {text}\nLess is held at once with a smaller --batch-size or fewer processes"
    # Libraries in other languages have errors of their own, known by their words.
    if number in FULL or os.strerror(errno.ENOSPC) in text:
        return f"error: the disk is full: {text}\nMake room, or name a directory on another disk, and run this again"
    if number == errno.ENAMETOOLONG:
        return f"error: a name is too long: {text[:200]}\nGive a file or directory a name of at most 255 bytes"
    if number in TOO_MANY:
        fix = "Raise the limit (ulimit -n 65536), or pass fewer processes, such as --data.num-workers 1"
        return f"error: too many open files: {text}\n{fix}"
    if number == errno.EAGAIN:
        return f"error: no process can be started: {text}\nPass fewer (--data.num-workers 0), or raise ulimit -u"
    if number == errno.EIO:
        return f"error: the disk does not work: {text}\nLook at it (dmesg), or name a directory on another disk"
    if number == errno.ENOTDIR:
        return f"error: a file is where a directory should be: {text}\nMove it away, or name another directory"
    if number in FORBIDDEN:
        return f"error: no permission: {text}\nName a directory that is yours, or change its permissions"
    return ""


def in_few_lines(error: BaseException) -> str:
    """An error's message in at most four lines: where it has more, those between first and last become one."""
    lines = f"error: {error}".splitlines()
    if len(lines) > MOST_LINES:
        between = "; ".join(line.strip() for line in lines[1:-1])
        if len(between) > MOST_CHARACTERS:
            between = f"{between[:MOST_CHARACTERS]} ... ({len(lines) - 2} in all)"
        lines = [lines[0], f"  {between}", lines[-1]]
    return "\n".join(lines)
