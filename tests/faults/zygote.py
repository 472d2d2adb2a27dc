"""A process that has imported everything, and forks one that runs the command for each line it reads.

Importing Lightning takes seconds, and a run with the tiny model a fraction of one: so ten kills cost little.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only

import detr_lightning.command.cli  # noqa: F401, which main imports only when it is needed
from detr_lightning.command.main import main

CLI = Path(__file__).resolve().parent.parent.parent / "cli.py"


def child(request: dict[str, Any]) -> int:
    os.setsid()
    # A shell that starts the tests in the background has them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    for stream, path in ((0, "/dev/null"), (1, request["out"]), (2, request["err"])):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, stream)
    rank_zero_only.rank = int(os.environ.get("RANK", "0"))
    sys.argv = [str(CLI), *request["args"]]  # of which Lightning launches the other ranks
    code: Any
    try:
        exec(request["patch"], {})
        code = main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 70
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code or 0)


def serve() -> None:
    print("ready", flush=True)
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        pid = os.fork()
        if not pid:
            code = 70
            with contextlib.suppress(BaseException):
                code = child(request)
            os._exit(code)
        print(pid, flush=True)


if __name__ == "__main__":
    serve()
