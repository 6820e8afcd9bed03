"""The fused head in a GPTModel of the Megatron-Core that is on the path: the installed one, or an older one in
`scripts/test_megatron_versions.sh`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("gpt_heads.py")


@pytest.mark.parametrize("ranks", [1, 2], ids=["one_rank", "two_ranks"])
def test_gradients_are_those_of_the_logits_to_the_bit(tmp_path: Path, ranks: int) -> None:
    """Tied and untied, float32 and bfloat16. `ranks` is the tensor-parallel size."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", WORKER, tmp_path],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(ranks)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(outputs)
    for rank in range(ranks):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        expected = os.environ.get("EXPECTED_MEGATRON_CORE") or version("megatron-core")
        assert found["version"].split("+")[0] == expected  # in a git checkout it ends with +COMMIT
        assert len(found["cases"]) == 4
        for case in found["cases"]:
            assert case["gradients"] == 0, case
            assert case["logprobs"] < 2e-6, case
            assert case["hooks"] == 1, case  # the layer's own, once in a forward pass
            assert case["state_dict_is_unchanged"], case
            # A tied weight's two gradients are added in another order, in bfloat16 on the logits' path.
            bar = {(True, "float32"): 1e-6, (True, "bfloat16"): 5e-3}.get((case["tied"], case["dtype"]), 0)
            assert case["main_grad"] <= bar, case
