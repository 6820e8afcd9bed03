"""The embedded engine samples from the trained policy, in every layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import VOCAB, everywhere, run, run_config
from torch import Tensor

from megatron_aspo.batch import Prompt, Sample
from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.data.tokenizer import AsciiTokenizer
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.model import model_inputs
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.rollout.megatron import EmbeddedEngine
from megatron_aspo.train import set_logprobs

pytestmark = pytest.mark.distributed

ALONE = ParallelConfig()
LAYOUTS = {
    "dp2": (2, ALONE),
    "tp2": (2, ParallelConfig(tensor=2)),
    "tp2-sp": (2, ParallelConfig(tensor=2, sequence_parallel=True)),
    "pp2": (2, ParallelConfig(pipeline=2)),
    "tp2-pp2-sp": (4, ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True)),
    "cp2": (2, ParallelConfig(context=2)),
    "tp2-cp2-sp": (4, ParallelConfig(tensor=2, context=2, sequence_parallel=True)),
    "cp2-pp2": (4, ParallelConfig(context=2, pipeline=2)),
}
ROLLOUT = RolloutConfig(max_response_tokens=12, temperature=0.8)


def make_prompts() -> list[Prompt]:
    """Nine prompts of 3 to 20 tokens, unsorted and of different lengths; the last is held out."""
    rng = np.random.default_rng(3)
    lengths = [7, 3, 20, 12, 3, 16, 9, 5, 14]
    ids = [*range(len(lengths) - 1), -1]
    return [Prompt(i, "", tuple(rng.integers(VOCAB, size=n).tolist()), {}) for i, n in zip(ids, lengths, strict=True)]


@contextlib.contextmanager
def loaded_policy(weights: Path, parallel: ParallelConfig, **sections: Any) -> Iterator[Policy]:
    config = run_config(parallel, **sections)
    with distributed(config):
        policy = Policy(config, VOCAB)
        checkpoint.load_weights(weights / "current", policy)
        yield policy


def generate(
    weights: Path,
    parallel: ParallelConfig,
    calls: Sequence[tuple[RolloutConfig, list[Prompt], int, float, int]],
    **sections: Any,
) -> list[list[Sample]]:
    """Samples of each call: (configuration, prompts, responses per prompt, temperature, seed)."""
    with loaded_policy(weights, parallel, **sections) as policy:
        return [
            everywhere(EmbeddedEngine(policy, rollout, AsciiTokenizer(), seed).generate(prompts, copies, temperature))
            for rollout, prompts, copies, temperature, seed in calls
        ]


def sample_and_recompute(
    weights: Path, parallel: ParallelConfig
) -> tuple[list[Sample], list[Sample], list[tuple[Tensor, Tensor]]]:
    """Greedy and sampled responses; and (log-probs of the sampler, of the trainer) of this rank's micro-batches with
    the latter, on the last stage."""
    rollout = RolloutConfig(max_response_tokens=12, batch_size=5, temperature=1.2)
    with loaded_policy(weights, parallel, rollout=rollout) as policy:
        engine = EmbeddedEngine(policy, rollout, AsciiTokenizer(), seed=1)
        greedy, samples = engine.generate(make_prompts(), 1, 0.0), engine.generate(make_prompts(), 4, 1.2)
        batches: list[Any] = policy.pack(samples)
        set_logprobs(policy, [batches])
        pairs = [
            (batch.rollout_logprobs[batch.loss_mask], batch.old_logprobs[batch.loss_mask])
            for batch in (batches if policy.is_last_stage else [])
        ]
        return everywhere(greedy), everywhere(samples), pairs


def sample_and_look(weights: Path, rollout: RolloutConfig, copies: int) -> tuple[list[Sample], list[Tensor]]:
    """Samples, and the model's tempered distributions [tokens, V] along each response."""
    with loaded_policy(weights, ALONE, rollout=rollout) as policy:
        engine = EmbeddedEngine(policy, rollout, AsciiTokenizer(), seed=1)
        samples = engine.generate(make_prompts()[:3], copies, rollout.temperature)
        distributions: list[Tensor] = []
        for sample in samples:
            (batch,) = policy.pack([sample])
            logits = policy.model(**model_inputs(batch))[0].detach().double()
            distributions.append(torch.softmax(logits[batch.loss_mask] / rollout.temperature, -1))
        return samples, distributions


def tokens_of(samples: Sequence[Sample]) -> list[tuple[int, ...]]:
    return [tuple(sample.token_ids.tolist()) for sample in samples]


def logprobs_of(samples: Sequence[Sample]) -> Any:
    return np.concatenate([sample.rollout_logprobs for sample in samples if sample.rollout_logprobs is not None])


def cut(token_ids: tuple[int, ...], stops: list[tuple[int, ...]], limit: int) -> tuple[tuple[int, ...], str]:
    """Truncate a response at the first stop sequence that it contains whole, or at the limit."""
    for end in range(1, limit + 1):
        if any(token_ids[:end][-len(stop) :] == stop for stop in stops):
            return token_ids[:end], "stop"
    return token_ids[:limit], "length"


@pytest.fixture(scope="module")
def responses(weights: Path) -> list[list[Sample]]:
    """Responses on one rank: greedy; four samples per prompt; the same with another seed; 50 for each of two ids of
    one prompt; and four per prompt, prompt by prompt."""
    prompts = make_prompts()
    twins = [prompts[0], Prompt(-1, "", prompts[0].token_ids, {})]
    calls = [
        (ROLLOUT, prompts, 1, 0.0, 1),
        (ROLLOUT, prompts, 4, 1.2, 1),
        (ROLLOUT, prompts, 4, 1.2, 2),
        (ROLLOUT, twins, 50, 1.2, 1),
        *((ROLLOUT, [prompt], 4, 1.2, 1) for prompt in prompts),
    ]
    results = run(1, generate, weights, ALONE, calls)[0]
    return [*results[:4], [sample for samples in results[4:] for sample in samples]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_responses_and_their_logprobs_are_the_same_at(
    layout: str, weights: Path, responses: list[list[Sample]]
) -> None:
    ranks, parallel = LAYOUTS[layout]
    by_rank = run(ranks, sample_and_recompute, weights, parallel)
    for greedy, samples, _ in by_rank:  # every rank has the whole list
        for ours, expected in zip((greedy, samples), responses[:2], strict=True):
            assert tokens_of(ours) == tokens_of(expected)
            assert logprobs_of(ours) == pytest.approx(logprobs_of(expected), abs=1e-5)
            assert [s.group for s in ours] == [s.group for s in expected]
    pairs = [pair for *_, pairs in by_rank for pair in pairs]
    sampled, recomputed = (torch.cat(values) for values in zip(*pairs, strict=True))
    assert len(sampled) > 300
    assert sampled.std() > 0.5
    assert (sampled - recomputed).abs().max() < 1e-4


def test_samples_depend_on_seed_prompt_and_replica_but_not_on_the_batch(responses: list[list[Sample]]) -> None:
    _, samples, other_seed, twins, one_by_one = responses
    assert all(a != b for a, b in zip(tokens_of(other_seed), tokens_of(samples), strict=True))
    assert len(set(tokens_of(twins))) == 100
    assert tokens_of(one_by_one) == tokens_of(samples)
    assert logprobs_of(one_by_one) == pytest.approx(logprobs_of(samples), abs=1e-5)


def test_responses_end_at_stop_strings_and_at_the_limit(weights: Path, responses: list[list[Sample]]) -> None:
    free = responses[1]
    inside = next(sample for sample in free if len(sample.token_ids) == 12).token_ids[3:5].tolist()
    # It begins in the prompt: no stop in the response.
    across = (free[0].prompt.token_ids[-1], int(free[0].token_ids[0]))
    stops = [(AsciiTokenizer.eos_id,), tuple(inside), across]
    rollout = RolloutConfig(max_response_tokens=8, stop=tuple("".join(map(chr, stop)) for stop in stops[1:]))
    (cut_short,) = run(1, generate, weights, ALONE, [(rollout, make_prompts(), 4, 1.2, 1)])[0]
    expected = [cut(tokens, stops, 8) for tokens in tokens_of(free)]
    assert [(tokens, s.finish_reason) for tokens, s in zip(tokens_of(cut_short), cut_short, strict=True)] == expected
    assert all(len(logprobs_of([sample])) == len(sample.token_ids) for sample in cut_short)
    endings = {(reason, token_ids[-1] == AsciiTokenizer.eos_id) for token_ids, reason in expected}
    assert endings == {("stop", True), ("stop", False), ("length", False)}
    assert len(cut_short[0].token_ids) > 1


def test_top_p_keeps_to_the_nucleus_and_reports_the_whole_distribution(weights: Path) -> None:
    nucleus = RolloutConfig(max_response_tokens=12, temperature=1.3, top_p=0.6)
    samples, distributions = run(1, sample_and_look, weights, nucleus, 20)[0]
    p = torch.cat(distributions)
    chosen = torch.tensor([token for sample in samples for token in sample.token_ids])
    own = p.gather(1, chosen[:, None])
    more_likely = torch.where(p > own, p, 0.0).sum(-1)
    assert len(own) > 500
    assert (more_likely < 0.6).all()
    assert (more_likely + own[:, 0] >= 0.6).sum() >= 5  # the token that crosses 0.6 is included
    assert logprobs_of(samples) == pytest.approx(own[:, 0].log().numpy(), abs=1e-4)


def deviation(counts: Tensor, p: Tensor) -> float:
    """Pearson's chi-square of `counts` against `p`, in standard deviations from its mean; rare tokens are pooled."""
    expected = p * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    chi_square = ((observed - expected).square() / expected).sum()
    freedom = len(observed) - 1
    return float((chi_square - freedom) / (2 * freedom) ** 0.5)


def test_first_tokens_are_distributed_as_the_tempered_softmax(weights: Path) -> None:
    rollout = RolloutConfig(max_response_tokens=1, temperature=1.5)
    prompt = make_prompts()[0]
    (samples,) = run(1, generate, weights, ALONE, [(rollout, [prompt], 10_000, 1.5, 1)])[0]
    counts = torch.bincount(torch.tensor(tokens_of(samples))[:, 0], minlength=VOCAB).double()
    _, (distribution, *_) = run(1, sample_and_look, weights, rollout, 1)[0]
    p = distribution[0]
    assert abs(deviation(counts, p)) < 4
    assert deviation(counts, p**1.1 / (p**1.1).sum()) > 8  # detects another temperature
