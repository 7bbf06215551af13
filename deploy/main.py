"""The program `paramserver`: finds the command and turns what it raises into an exit code.

Commands are imported when they are called, so that ``paramserver --help`` needs no torch.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from deploy.flags import UsageError
from paramserver.errors import ParamServerError, PluginError, TaskError

logger = logging.getLogger(__name__)

FAILED, USAGE, INTERRUPTED = 1, 2, 130

_COMMANDS: Mapping[str, tuple[str, str]] = {
    "train": ("deploy.train", "train for real, asynchronously or synchronously"),
    "simulate": (
        "deploy.simulate",
        "train in virtual time, with the delays of your choice",
    ),
    "replay": ("deploy.replay", "a run once more from its record, bit for bit, or what if"),
    "list": ("deploy.listing", "the tasks, optimizers, rules, …: names, keys, defaults, sources"),
    "experiment": ("deploy.experiment.command", "many runs compared: a table, CSV files and plots"),
    "report": ("deploy.reporting", "one or several runs as a self-contained page"),
    "surface": ("deploy.surface.command", "the loss around a run, with the path of training on it"),
    "diagnose": ("deploy.diagnose", "a minimum or a saddle? Hessian, gradients and units of a run"),
    "bench": ("deploy.benching", "measure push and pull, training or all-reduce on this machine"),
}

_OURS = tuple(
    str(Path(__file__).resolve().parent.parent / package) + os.sep
    for package in ("paramserver", "workers", "sync", "async_sgd", "deploy")
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``, by default the process's own, and return its exit code.

    0: done. 1: a run failed. 2: the command line asks for something that does not exist.
    130: Ctrl-C, after the record was written.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    _look_for_modules_here()
    try:
        return _command(argv)
    except SystemExit as end:  # argparse ends so after --help
        return end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except (UsageError, PluginError) as error:
        return _say(str(error), USAGE)
    except TaskError as error:
        _print_their_traceback(error.__cause__)
        return _say(str(error), FAILED)
    except ParamServerError as error:
        logger.debug("the command failed", exc_info=True)
        return _say(str(error), FAILED)


def _command(argv: Sequence[str]) -> int:
    if argv and argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    known = ", ".join(_COMMANDS)
    if not argv:
        raise UsageError(f"name a command: {known} (see `paramserver --help`)")
    if argv[0] not in _COMMANDS:
        close = difflib.get_close_matches(argv[0], _COMMANDS, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"there is no command {argv[0]!r}{meant} (there are {known})")
    module, _ = _COMMANDS[argv[0]]
    code: int = importlib.import_module(module).run(argv[1:])
    return code


def _help() -> str:
    lines = [f"  {name:<10} {what}" for name, (_, what) in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: paramserver COMMAND [flags]",
            "",
            "A parameter server for PyTorch on Ray: asynchronous SGD with exact staleness, and",
            "synchronous SGD by all-reduce.",
            "",
            *lines,
            "",
            "`paramserver COMMAND --help` lists the flags. For a start: `paramserver train`",
        ]
    )


def _look_for_modules_here() -> None:
    """Let ``--task mymodule:factory`` find a module in the current directory.

    It is looked in last, so that a user's folder called ``workers`` does not hide ours.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def _say(message: str, code: int) -> int:
    print(f"paramserver: {message}", file=sys.stderr)
    return code


def _print_their_traceback(error: BaseException | None) -> None:
    """Print the traceback of a user's own error from where it enters the user's code."""
    if error is None:
        return
    trace: TracebackType | None = error.__traceback__
    while trace is not None and _is_ours(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    # The error may have been raised by ours alone, as for a module that is not there.
    traceback.print_exception(type(error), error, trace)


def _is_ours(file: str) -> bool:
    return file.startswith((*_OURS, "<frozen importlib")) or file == importlib.__file__
