"""Exit codes and error messages of `predict` and `validate`."""

from __future__ import annotations

import sys
from collections.abc import Callable

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed import DistError

from detr_lightning.errors import DETRLightningError

FAILURES = {
    "out of memory": "The device is out of memory ({}). Set data.batch_size lower.",
    "can't allocate memory": "Out of memory ({}). Set data.batch_size or data.num_workers lower.",
    "ended before": "{}",
    **dict.fromkeys(("gloo", "NCCL", "Connection closed by peer"), "Another rank ended: see its message ({})."),
    "unable to allocate shared memory": "Data workers have too little shared memory ({}). Set data.num_workers or "
    "data.batch_size lower, or give the container more: docker run --shm-size=2g.",
    "unable to open shared memory object": "Data workers cannot use /dev/shm ({}). Make it writable, or set "
    "data.num_workers to 0.",
    "DataLoader worker": "A data worker ended unexpectedly ({}). If memory ran out, set data.num_workers or "
    "data.batch_size lower.",
    "C++ compile": "model.compile needs a working C++ compiler, such as g++ ({}). "
    "Install one, or leave model.compile out.",
}
"""Messages for torch errors that a user can fix, by a fragment of torch's own message."""


def exit_code(run: Callable[[], object], kept: str = "") -> int:
    """Run a function and print an error as one message. A programming error is raised, with its traceback.

    Args:
        run: The function to run.
        kept: A sentence to add after Ctrl-C or a torch error, if finished work is kept.

    Returns:
        0 for success, 1 for an error, 130 after Ctrl-C.
    """
    try:
        run()
    except KeyboardInterrupt:
        return _fail("Interrupted.", 130, kept)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning turned it into an exit
            return _fail("Interrupted.", 130, kept)
        raise
    except (DETRLightningError, OSError, MisconfigurationException) as error:
        return _fail(str(error), 1)
    except DistError as error:
        return _fail(FAILURES["gloo"].format(str(error).strip().splitlines()[0]), 1, kept)
    except RuntimeError as error:
        for sign, message in FAILURES.items():
            for line in str(error).splitlines():
                if sign in line:
                    return _fail(message.format(line.strip()), 1, kept)
        raise
    return 0


def _fail(message: str, code: int, kept: str = "") -> int:
    rank = this_rank()
    message += f" {kept}" if kept and kept not in message else ""
    where = f" (rank {rank})" if rank else ""
    print(f"Error{where}: {message}", file=sys.stderr, flush=True)
    return code


def this_rank() -> int:
    """Return this process's rank, which Lightning sets on import."""
    rank: int = getattr(rank_zero_only, "rank", 0)
    return rank
