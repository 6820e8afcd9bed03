"""Scores of reasoning-gym's own verifiers."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from megatron_aspo.errors import UserError


def judge(response: str, entry: dict[str, Any]) -> float:
    """The score of the task's verifier, from 0 to 1 (1: right). The whole response, stripped, is the answer, also where
    the length limit cut it."""
    verify = _verifier(entry["metadata"]["source_dataset"])
    return float(verify(answer=response.strip(), entry=entry))


@functools.cache
def _verifier(task: str) -> Any:
    # It makes a data set, and some of those read files.
    return import_reasoning_gym().get_score_answer_fn(task)


def import_reasoning_gym() -> Any:
    """The package, imported lazily because it takes seconds. One of its dependencies warns of its own syntax."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            import reasoning_gym
        except ImportError as error:
            raise UserError(f"cannot import reasoning_gym: {error}; pip install 'megatron-aspo[train]'") from None

    return reasoning_gym
