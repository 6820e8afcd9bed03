"""A small run to rehearse, and the condition for rehearsals."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "examples/demo_chain_sum.yaml")

MARKS = [
    pytest.mark.engines,
    pytest.mark.skipif(
        not (ROOT / ".cache/te/transformer_engine").is_dir(), reason="no Transformer Engine's Python; make rehearsal"
    ),
]

TINY = (
    "model.num_layers=2",
    "model.hidden_size=256",
    "model.ffn_hidden_size=512",
    "model.num_attention_heads=8",
    "model.num_query_groups=4",
    "model.max_sequence_length=128",
    "model.dtype=bfloat16",
    "rollout.max_response_tokens=96",
    "train.max_tokens_per_micro_batch=512",
)
EXPERTS = ("model.num_experts=8", "model.moe_top_k=2", "model.moe_ffn_hidden_size=256", "model.ffn_hidden_size=256")
