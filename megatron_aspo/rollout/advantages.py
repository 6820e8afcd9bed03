"""Advantages from the rewards of a batch, and which groups carry a signal.

An advantage function maps the rewards of each group, a list of float64 arrays, to arrays of the same shapes. It sees
the samples with a verdict only, of the groups that are trained on, and all of the batch's, on every rank the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from megatron_aspo.batch import Sample
from megatron_aspo.config.import_path import import_object
from megatron_aspo.errors import RunError

EPSILON = 1e-6

Groups = list[npt.NDArray[np.float64]]
AdvantageFunction = Callable[[Groups], Groups]


def grpo(groups: Groups) -> Groups:
    """(R - mean R) / (std R + 1e-6) within the group, with the unbiased deviation (the ASPO authors' recipe)."""
    return [_centred(rewards) / (_deviation(rewards) + EPSILON) for rewards in groups]


def no_std(groups: Groups) -> Groups:
    """R - mean R (Dr. GRPO, arXiv 2503.20783)."""
    return [_centred(rewards) for rewards in groups]


def rloo(groups: Groups) -> Groups:
    """R minus the mean of the group's others (arXiv 2402.14740)."""
    return [_centred(rewards) * len(rewards) / max(len(rewards) - 1, 1) for rewards in groups]


def maxrl(groups: Groups) -> Groups:
    """(R - mean R) / (mean R + 1e-6) (arXiv 2602.02710), for rewards >= 0; 0 where mean R is not positive."""
    return [_centred(rewards) / (rewards.mean() + EPSILON if rewards.mean() > 0 else np.inf) for rewards in groups]


def reinforce_plus_plus(groups: Groups) -> Groups:
    """(R - mean R) / (std R + 1e-6) over all responses of the batch, without a group baseline (arXiv 2501.03262)."""
    rewards = np.concatenate(groups)
    scaled = _centred(rewards) / (_deviation(rewards) + EPSILON)
    return np.split(scaled, np.cumsum([len(group) for group in groups])[:-1])


def reinforce_plus_plus_baseline(groups: Groups) -> Groups:
    """`no_std`, then divided by its deviation over the batch: REINFORCE++ with a group baseline (arXiv 2501.03262)."""
    return reinforce_plus_plus(no_std(groups))


ADVANTAGES: dict[str, AdvantageFunction] = {
    "grpo": grpo,
    "no_std": no_std,
    "rloo": rloo,
    "reinforce++": reinforce_plus_plus,
    "reinforce++_baseline": reinforce_plus_plus_baseline,
    "maxrl": maxrl,
}


def find_advantage(name: str) -> AdvantageFunction:
    """The function of `rollout.advantage`; UserError if it cannot be imported or does not take one argument."""
    return ADVANTAGES.get(name) or import_object(name, "groups")


def fill_advantages(groups: Sequence[Sequence[Sample]], name: str = "grpo") -> None:
    """Set the advantages of a batch's samples. Samples without a verdict get 0.

    Raises:
        RunError: a user's function fails or does not return one finite number per reward.
    """
    judged = [[sample for sample in group if not sample.unjudged] for group in groups]
    judged = [group for group in judged if group]
    rewards = [np.array([sample.reward for sample in group], dtype=np.float64) for group in judged]
    for sample in (sample for group in groups for sample in group):
        sample.advantage = 0.0
    if not judged:
        return
    try:
        found = [np.asarray(column, dtype=np.float64) for column in find_advantage(name)(rewards)]
    except Exception as error:  # whatever the user's function raises
        raise RunError(f"rollout.advantage={name} failed: {type(error).__name__}: {error}") from error
    if [x.shape for x in found] != [x.shape for x in rewards] or not all(np.isfinite(x).all() for x in found):
        raise RunError(f"rollout.advantage={name} must return one finite number per reward, in arrays as it got them")
    for group, column in zip(judged, found, strict=True):
        for sample, advantage in zip(group, column, strict=True):
            sample.advantage = float(advantage)


def has_signal(group: Sequence[Sample]) -> bool:
    """Whether the scores of a group's judged samples differ. Equal scores teach only the length penalty, if any."""
    return len({sample.score for sample in group if not sample.unjudged}) > 1


def _centred(rewards: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rewards minus their mean; exactly 0 where all are equal, whose mean may differ from them in the last bit."""
    return rewards - rewards.mean() if np.ptp(rewards) else np.zeros_like(rewards)


def _deviation(rewards: npt.NDArray[np.float64]) -> float:
    """The unbiased standard deviation; 0 for a single reward."""
    return float(rewards.std(ddof=1)) if len(rewards) > 1 else 0.0
