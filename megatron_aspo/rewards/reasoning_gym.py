"""reasoning-gym's own verifier."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from megatron_aspo.data import import_reasoning_gym
from megatron_aspo.types import Sample


def score(samples: Sequence[Sample]) -> None:
    """Fill in `reward`: what the task's verifier gives, from 0 to 1 (1: right).

    The response as a whole is the answer, without surrounding white space. A response cut at the length limit
    counts as it stands.
    """
    for sample in samples:
        entry = sample.prompt.entry
        verify = _verifier(entry["metadata"]["source_dataset"])
        sample.reward = float(verify(answer=sample.text.strip(), entry=entry))


@functools.cache
def _verifier(task: str) -> Any:
    # Making one makes a data set, and some of those read files.
    return import_reasoning_gym().get_score_answer_fn(task)
