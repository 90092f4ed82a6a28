"""How a command ends: a user's mistake with a few lines and exit code 2, a bug with its traceback.

A mistake is an error that this project raises itself, with a `raise` that says what was found and what to do. Whatever
comes from elsewhere, or from an expression, nobody has foreseen: it is a bug.
"""

import contextlib
import errno
import io
import linecache
import sys
from collections.abc import Callable
from typing import Any

import tyro

from smolvla_shared import paths

EXIT_MISTAKE = 2  # as tyro's and argparse's
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
MOST_LINES, MOST_CHARACTERS = 4, 1000
# The machine's refusals: the disk is full, or not the user's.
MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def run_command(main: Callable[..., None], options: Any = None) -> None:
    """main(options from the command line), or main() if it reads its options itself (by `parse`).

    options: the dataclass that tyro makes of the command line
    """
    try:
        main(parse(options)) if options else main()
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if not is_mistake(error):
            raise
        print(in_few_lines(error), file=sys.stderr)
        sys.exit(EXIT_MISTAKE)


def parse(options: Any, **more: Any) -> Any:
    """tyro.cli(options, **more), with paths that hold what they should; a refusal of the options' own comes back as it
    was raised, not in tyro's frame.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(options, **more)
    except SystemExit as stop:
        error = stop.__context__
        while error and not is_mistake(error):
            error = error.__context__
        if error:
            raise error from None
        sys.stderr.write(said.getvalue())
        raise
    paths.check(config)
    return config


def is_mistake(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in MACHINE:
        return True
    if not isinstance(error, ValueError | OSError | ImportError) or error.__traceback__ is None:
        return False
    last = error.__traceback__
    while last.tb_next:
        last = last.tb_next
    module = last.tb_frame.f_globals.get("__name__", "")
    line = linecache.getline(last.tb_frame.f_code.co_filename, last.tb_lineno)
    is_ours = module == "__main__" or module.split(".")[0] in ("smolvla_shared", "train_stage2", "train_stage3")
    return is_ours and line.lstrip().startswith("raise ")


def in_few_lines(error: BaseException) -> str:
    """An error's message in at most four lines: where it has more, those between first and last become one."""
    lines = f"error: {error}".splitlines()
    if len(lines) > MOST_LINES:
        between = "; ".join(line.strip() for line in lines[1:-1])
        if len(between) > MOST_CHARACTERS:
            between = f"{between[:MOST_CHARACTERS]} ... ({len(lines) - 2} in all)"
        lines = [lines[0], f"  {between}", lines[-1]]
    return "\n".join(lines)
