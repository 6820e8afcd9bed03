"""A rehearsal finds each fault that is put back into the code, by a line that names its cause."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import planted_faults
import pytest
import torch
from planted_faults import FAULTS, ROOT, edited

TE = ROOT / ".cache/te"
pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(not (TE / "transformer_engine").is_dir(), reason="no Transformer Engine's Python"),
]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Name of each fault -> findings, all from one process."""
    result = tmp_path_factory.mktemp("faults") / "lines.json"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (TE, ROOT))),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-W", "ignore", planted_faults.__file__, str(result)]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(result.read_text())


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, lines: dict[str, list[str]]) -> None:
    found = "\n".join(lines[name])
    assert re.search(FAULTS[name].finding, found, re.DOTALL), found


def test_vllm_refuses_to_start_without_its_share_of_memory(tmp_path: Path) -> None:
    """On a GPU that the policy fills; the share is that of the engine's own arguments."""
    import test_vllm_arguments

    edit = ('        "gpu_memory_utilization": _MEMORY_UTILIZATION,\n', "")
    with (
        edited("megatron_aspo.rollout.vllm_start:engine_arguments", [edit]),
        pytest.raises(ValueError, match=r"gpu_memory_utilization|GPU memory utilization"),
    ):
        test_vllm_arguments.test_vllm_starts_beside_a_policy_that_fills_most_of_the_gpu(tmp_path)
    assert not torch.cuda.is_available()
