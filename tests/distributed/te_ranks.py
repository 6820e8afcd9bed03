"""Ranks that train Transformer Engine's layers on this CPU, in a process that has its Python on the path.

The test's own process never imports Transformer Engine: it changes which local layers Megatron-Core builds.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import _free_port, _outputs

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".cache" / "te"
"""Where `make rehearsal` puts Transformer Engine's Python."""

HOPPER, BLACKWELL = (9, 0), (10, 0)

needs_te = pytest.mark.skipif(
    not (PYTHON / "transformer_engine").is_dir(), reason="`make .cache/te/.installed` fetches Transformer Engine"
)


@functools.cache
def _server() -> subprocess.Popen[bytes]:
    path = [PYTHON, ROOT / "tests", ROOT / "tests" / "distributed", ROOT / "tests" / "engines", ROOT]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "te_reference.server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[bytes]) -> None:
    assert server.stdin is not None
    server.stdin.close()
    server.wait()


def run(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    capability: tuple[int, int] = HOPPER,
    gpu: bool = True,
    timeout: float = 240,
) -> list[Any]:
    """Run `function(*args)` on each rank of a new world with Transformer Engine; return the ranks' results in order.

    Args:
        capability: compute capability of the GPU that the ranks find.
        gpu: False leaves `te_reference.install.pretend_gpu` to the function.

    Raises:
        AssertionError: if a rank failed or timed out; contains its traceback and output.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "world_size": world_size,
            "port": _free_port(),
            "folder": folder,
            "call": pickle.dumps((function, args)),
            "capability": capability,
            "gpu": gpu,
            "timeout": timeout,
        }
        pickle.dump(request, server.stdin)
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the process with Transformer Engine ended"
        codes = json.loads(answer)
        assert codes == [0] * world_size, f"exit codes {codes}\n{_outputs(folder)}"
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
