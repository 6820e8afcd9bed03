"""Transformer Engine's layers under every FP8 recipe, in an interpreter that has it; see scripts/build_te.sh.

It takes no GPU to make the specs and Megatron's recipe objects. What the layers compute takes one.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("MEGATRON_ASPO_TE_PYTHON", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON, reason="MEGATRON_ASPO_TE_PYTHON names no interpreter with Transformer Engine; scripts/build_te.sh"
    ),
]

MAKE = """
import json, sys
import torch
import transformer_engine
import transformer_engine.pytorch
import torch.distributed as dist
from megatron.core import parallel_state
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
parallel_state.initialize_model_parallel()
torch.cuda.is_available = lambda: True  # the specs are chosen by it; no GPU is touched
from megatron.core.fp8_utils import get_fp8_recipe
from megatron_aspo.accelerators import find_accelerators
from megatron_aspo.config import ModelConfig, RunConfig
from megatron_aspo.fp8 import Fp8Config
from megatron_aspo.policy.model import _architecture, _block_spec, transformer_config
recipe, format, start = sys.argv[1], sys.argv[2], int(sys.argv[3])
fp8 = Fp8Config(recipe=recipe, format=format, bf16_layers_at_start=start)
model = ModelConfig(hidden_size=256, ffn_hidden_size=512, num_layers=4, dtype="bfloat16")
config = transformer_config(RunConfig(name="test", model=model, fp8=fp8), _architecture(model))
layers = _block_spec(config).layer_specs
assert len(layers) == 4
layer = layers[-1].submodules
made = get_fp8_recipe(config)
linears = [layer.self_attention.submodules.linear_qkv, layer.self_attention.submodules.linear_proj]
print(json.dumps({
    "te": transformer_engine.__version__,
    "adam": find_accelerators().adam,
    "recipe": type(made).__name__,
    "kind": [made.delayed(), made.float8_current_scaling(), made.float8_block_scaling(), made.mxfp8()],
    "format": made.fp8_format.name,
    "linears": [linear.__name__ for linear in linears],
    "bf16": [config.first_last_layers_bf16, config.num_layers_at_start_in_bf16],
    "output": config.fp8_output_proj,
    "history": [getattr(made, "amax_history_len", None), getattr(made, "margin", None)],
}))
"""


def make(recipe: str, format: str, start: int) -> dict[str, Any]:
    done = subprocess.run(
        [PYTHON, "-W", "ignore", "-c", MAKE, recipe, format, str(start)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("recipe", "format", "start", "kind"),
    [
        ("delayed", "hybrid", 0, 0),
        ("current", "hybrid", 1, 1),
        ("blockwise", "e4m3", 1, 2),
        ("blockwise", "hybrid", 0, 2),
        ("mxfp8", "e4m3", 0, 3),
    ],
)
def test_the_layers_of_a_recipe(recipe: str, format: str, start: int, kind: int) -> None:
    made = make(recipe, format, start)
    assert made["te"].startswith("2.")
    assert made["adam"] == "Transformer Engine"
    assert made["kind"] == [i == kind for i in range(4)]
    assert made["format"] == format.upper()
    assert made["linears"] == ["TELayerNormColumnParallelLinear", "TERowParallelLinear"]
    assert made["bf16"] == [start > 0, start]
    assert made["output"] is False
    if recipe == "delayed":
        assert made["history"] == [1, 0]
