"""The ranks of these tests start with what takes long to import."""

import sys

import pytest
from ranks import PRELOADED, run

pytestmark = pytest.mark.engines


def not_imported(modules: list[str]) -> list[str]:
    return [module for module in modules if module not in sys.modules]


def test_ranks_are_forked_with_the_engines_imported() -> None:
    assert {"megatron_aspo.train", "vllm.entrypoints.llm", "megatron_aspo.policy.hf"} <= {*PRELOADED}
    assert run(1, not_imported, PRELOADED) == [[]]
