"""reasoning-gym's own verifier."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_aspo.data import import_reasoning_gym
from megatron_aspo.types import Sample


def score(samples: Sequence[Sample]) -> None:
    """Fill in `reward`: what the task's verifier gives, from 0 to 1 (1: right).

    The response as a whole is the answer, without surrounding white space. A response cut at the length limit
    counts as it stands.
    """
    get_score_answer = import_reasoning_gym().get_score_answer_fn
    for sample in samples:
        entry = sample.prompt.entry
        verify = get_score_answer(entry["metadata"]["source_dataset"])
        sample.reward = float(verify(answer=sample.text.strip(), entry=entry))
