"""Data workers as processes: that they end."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
from torch.utils.data import DataLoader
from detr_lightning.data.loading import leave_signals_to_parent
iterator = iter(DataLoader(range(100), num_workers=1, worker_init_fn=leave_signals_to_parent))
print(next(iterator))
"""


def test_a_program_that_still_holds_an_iterator_ends() -> None:
    """As a traceback may hold it. The interpreter then ends the workers with SIGTERM, and waits for them."""
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode, done.stdout) == (0, "tensor([0])\n"), done.stderr
