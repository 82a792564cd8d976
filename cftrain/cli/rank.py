"""`python -m cftrain.cli.rank FD ARGUMENTS`: `cftrain ARGUMENTS` below a `RankAgent`.

An error goes to the descriptor FD, not to stderr: so it can be named once, with rank and node, where every rank would
print it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from typing import Any

import click

from cftrain.cli import main
from cftrain.stopping import SIGNALS

_MOST = 8_000
"""Characters of a traceback: the pipe is read when the process has ended, and holds 64 KiB."""


def serve(report: int, arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in what a shell starts in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_agent, daemon=True).start()
    sys.argv = ["cftrain", *arguments]  # what provenance.json shall say
    try:
        # The agent has it start with SIGINT blocked, and Ray's own processes block it: what came meanwhile comes now
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        code = main(arguments, prog_name="cftrain", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except click.ClickException as error:
        _tell(report, how="said", why=error.format_message(), trace="")
        return error.exit_code
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        first = (str(error).strip().splitlines() or ["no message"])[0]
        why = f"{type(error).__name__}: {first} ({place.filename}:{place.lineno})"
        _tell(report, how="crashed", why=why, trace=traceback.format_exc()[-_MOST:])
        return 1
    return int(code or 0)


def _tell(report: int, **words: Any) -> None:
    with open(report, "w") as file:
        json.dump(words, file)


def _end_with_agent() -> None:
    """Nobody waits for the results of an orphan, and somebody may have resumed the run."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(serve(int(sys.argv[1]), sys.argv[2:]))
