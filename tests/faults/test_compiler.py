"""A machine without a C++ compiler, which torch.compile needs on a CPU."""

from __future__ import annotations

import pytest
from harness import Job, message

WITHOUT = "import torch._inductor.config as config; config.cpp.cxx = ('no-such-compiler',)"


@pytest.mark.slow
def test_compiling_without_a_compiler_says_so(job: Job) -> None:
    run = job.start("--model.compile", "true", patch=WITHOUT)
    assert run.wait() == 1
    assert "model.compile needs a working C++ compiler" in message(run.err)
    assert job.unfinished
    job.finish()
