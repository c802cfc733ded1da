"""The Triton kernels run under Triton's interpreter, on the CPU: their results, not their speed.

The interpreter is chosen when Triton is first imported, hence the process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[2]


def test_importing_the_package_loads_neither_torch_nor_triton() -> None:
    check = "import sys, sgl_kernel; assert not {'torch', 'triton'} & sys.modules.keys()"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "sgl-kernel")}
    subprocess.run([sys.executable, "-c", check], env=environment, check=True, timeout=60)


def test_models_load_and_norm_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; import torch, sglang.srt.models.decoder\n"
        "from sglang.srt.layers.norm import rms_norm\n"
        "assert rms_norm(torch.full((2, 8), 3.0), torch.ones(8), 0.0).eq(1).all()"
    )
    path = os.pathsep.join(str(REPOSITORY / part) for part in ("python", "sgl-kernel", "."))
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: no interpreter"
)
@pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="Triton's interpreter reads arrays of one element as numbers, NumPy 2.4 forbids it",
)
@pytest.mark.parametrize(
    ("module", "at_least"),
    [("test_kernels.py", 50), ("test_fused_kernels.py", 60), ("test_matmul.py", 40)],
)
def test_kernels_match_their_references_when_interpreted(module: str, at_least: int) -> None:
    # Without test/gpu/conftest.py, which skips all tests there where it finds no GPU.
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--noconftest", f"test/gpu/{module}"],
        cwd=REPOSITORY,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None, run.stdout[-2000:]
    assert int(passed[1]) >= at_least, run.stdout[-2000:]
