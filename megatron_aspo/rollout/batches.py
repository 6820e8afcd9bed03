"""Batches of scored responses with the advantages of their groups, and the evaluation on held-out prompts."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from megatron_aspo.batch import Batch, Sample
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.training import EvalConfig
from megatron_aspo.data import PromptStream
from megatron_aspo.errors import UserError
from megatron_aspo.journal.clock import Clock
from megatron_aspo.ranks.process_group import warn
from megatron_aspo.rewards.scoring import Scorer, check_judged
from megatron_aspo.rollout.advantages import fill_advantages, has_signal
from megatron_aspo.rollout.metrics import pass_rates, sample_metrics, solve_rates
from megatron_aspo.rollout.partial import Pool, steps_behind
from megatron_aspo.rollout.weight_sync import check_weight_version

if TYPE_CHECKING:
    from megatron_aspo.policy.trainer import Policy
    from megatron_aspo.rollout.engine import RolloutEngine


class Batches:
    """Source of the steps' batches. All training ranks make the same calls.

    Batches are sampled `max_staleness` steps ahead: step n begins by sampling the batch of step n + max_staleness with
    the weights after step n - 1. Rollout ranks write it during training; the request follows the weights through the
    channel. The batch of step n is thus written by the weights after step max(0, n - 1 - max_staleness), and at most
    `max_staleness` batches are ahead of the step that trains.

    Args:
        engine: a `RolloutEngine`; a `RemoteEngine` with rollout ranks.
        prompts: stands behind the batch of step `done`.
        done, last: number of completed steps, and of the run's last step.
        saved: batches sampled ahead, from the checkpoint of step `done`. All are sampled again if any is too stale for
            this configuration.
        groups: those in progress behind them, `in_progress` of the checkpoint.

    Raises:
        UserError: groups are in progress, and the configuration does not continue them.
    """

    def __init__(
        self,
        policy: Policy,
        engine: Any,
        prompts: PromptStream,
        scorer: Scorer,
        config: RolloutConfig,
        done: int,
        last: int,
        saved: Sequence[Batch] = (),
        groups: dict[str, Any] | None = None,
    ) -> None:
        limit = config.max_staleness
        is_too_stale = any(batch.metrics["rollout/staleness"] > limit for batch in saved)
        if groups and (config.oversample == 1 or is_too_stale):
            setting = f"max_staleness={limit}" if is_too_stale else "oversample=1"
            raise UserError(
                f"the checkpoint has {len(groups['groups'])} unfinished groups of prompts, which are lost with "
                f"rollout.{setting}; set rollout.{setting.split('=')[0]} to the value before, or delete the "
                "checkpoint's groups.pt, which leaves their prompts out"
            )
        if is_too_stale:
            warn(
                f"the checkpoint has {len(saved)} batch(es) that were sampled ahead and are too stale for "
                f"rollout.max_staleness={limit}; they are sampled again, so this run is not the one that was "
                "interrupted"
            )
            saved = ()
        self.policy = policy
        self.engine = engine
        self.prompts = prompts
        self.scorer = scorer
        self.config = config
        self._step = done
        self._last = last
        # Batches, and those requested: the answer, the oldest and the newest version that may write it, the staleness.
        self._ahead: deque[Batch | tuple[Future[Batch], int, int, int]] = deque(saved)
        self._pool = Pool(engine, config) if config.oversample > 1 and not config.ranks else None
        replicas = self._pool.replicas if self._pool else config.ranks // config.tensor
        behind = steps_behind(config, groups, replicas)
        # Of the last batches: the version of the policy at the request. Older weights wrote nothing of the next one.
        self._versions = deque([0] * (behind + 1), maxlen=behind + 1)
        if config.ranks:
            engine.set_stream(prompts, saved[-1].prompts if saved else prompts.state_dict(), groups)
        elif self._pool and groups:
            self._pool.load_state_dict(groups)

    def next(self, clock: Clock) -> Batch:
        """Return the next step's batch, and move the prompt stream behind it.

        Raises:
            WeightSyncError: weights other than those of the request wrote the batch.
        """
        version = self.policy.weight_version
        self._step += 1
        while len(self._ahead) <= min(self.config.max_staleness, self._last - self._step):
            self._versions.append(version)
            if self.config.ranks:
                self._ahead.append((self.engine.request_batch(), self._versions[0], version, len(self._ahead)))
            else:
                self._ahead.append(self._sample(version, clock))
        with clock("rollout") if self.config.ranks else contextlib.nullcontext():
            batch = self._receive(self._ahead.popleft())
        self.prompts.load_state_dict(batch.prompts)
        if self.config.ranks or self.config.max_staleness:
            batch.metrics["rollout/staleness_updates"] = float(version - batch.weight_version)
        return batch

    def _sample(self, version: int, clock: Clock) -> Batch:
        """Sample the batch behind those ahead with this process's engine."""
        if self._ahead:
            last = self._ahead[-1]
            assert isinstance(last, Batch)
            self.prompts.load_state_dict(last.prompts)
        batch = sample_batch(self.engine, self.prompts, self.scorer, self.config, clock, self._pool)
        check_weight_version(batch, self._versions[0], version)
        if self.config.max_staleness:
            batch.metrics["rollout/staleness"] = float(len(self._ahead))
        return batch

    def ahead(self) -> list[Batch]:
        """Return the batches for later steps, for a checkpoint. Waits for those that were requested."""
        batches = [self._receive(batch) for batch in self._ahead]
        self._ahead = deque(batches)
        return batches

    def in_progress(self) -> dict[str, Any] | None:
        """The groups that are in progress after the batches of `ahead`, on rank 0, for a checkpoint; elsewhere without
        their responses. None on all ranks or on none. Collective."""
        if self.config.oversample == 1:
            return None
        return self._pool.state_dict() if self._pool else self.engine.groups()

    def _receive(self, batch: Batch | tuple[Future[Batch], int, int, int]) -> Batch:
        if isinstance(batch, Batch):
            return batch
        answer, oldest, newest, staleness = batch
        received = self.engine.receive(answer)
        check_weight_version(received, oldest, self.policy.weight_version if self.config.in_flight else newest)
        received.metrics["rollout/staleness"] = float(staleness)
        return received


def sample_batch(
    engine: RolloutEngine,
    prompts: PromptStream,
    scorer: Scorer,
    config: RolloutConfig,
    clock: Clock,
    pool: Pool | None = None,
) -> Batch:
    """Sample and score groups of responses, and compute their advantages. A `pool` samples in place of the engine.

    Dynamic sampling drops groups without a signal and refills from new prompts, for at most `max_rounds` rounds. The
    batch has fewer groups if that is not enough. Responses without a verdict are left out of it.

    Raises:
        RunError: more than `reward.max_unjudged` of the responses have no verdict.
    """
    started, before, written_before = time.time(), clock["rollout"], pool.written if pool else 0
    size = config.responses_per_prompt
    kept: list[list[Sample]] = []
    responses: list[Sample] = []
    rounds = 0
    while len(kept) < config.prompts_per_step and rounds < (config.max_rounds if config.dynamic_sampling else 1):
        missing = config.prompts_per_step - len(kept)
        with clock("rollout"):
            first_group = len(responses) // size
            if pool is None:
                samples = engine.generate(prompts.draw(missing), size, config.temperature, first_group)
            else:
                samples = pool.sample(prompts, missing, first_group)
        with clock("reward"):
            scorer.score(samples)
        responses += samples
        kept += [group for group in _groups(samples, size) if has_signal(group) or not config.dynamic_sampling]
        check_judged(responses, scorer.config)
        rounds += 1
    sampled = _groups(responses, size)
    if not kept:
        warn(
            f"none of {len(sampled)} groups has scores that differ, so this step makes no update; the task is too hard "
            "or too easy for the policy, or rollout.responses_per_prompt is too small"
        )
    fill_advantages(kept, config.advantage)
    written = pool.written - written_before if pool else sum(sample.written_length for sample in responses)
    metrics = {
        **sample_metrics(responses, "rollout"),
        **solve_rates(sampled),
        "rollout/tokens_per_second": written / (clock["rollout"] - before),
        "rollout/rounds": float(rounds),
        "rollout/groups_kept": float(len(kept)),
        "rollout/groups_dropped": float(len(sampled) - len(kept)),
    }
    if pool is not None:
        pool.batch += 1
        metrics["rollout/groups_in_progress"] = float(len(pool.groups))
    if prompts.config.overlong_prompts == "filter":
        metrics["data/overlong_prompts"] = float(prompts.overlong)
    trained = [[sample for sample in group if not sample.unjudged] for group in kept]
    if scorer.config.overlong_filter:
        whole = [[sample for sample in group if sample.finish_reason != "length"] for group in trained]
        metrics["rollout/overlong_filtered"] = float(sum(map(len, trained)) - sum(map(len, whole)))
        if any(trained) and not any(whole):
            warn(
                "reward.overlong_filter removes every response, because all were cut at rollout.max_response_tokens="
                f"{config.max_response_tokens}; this step makes no update; raise the limit"
            )
        trained = whole
    groups = [group for group in trained if group]
    return Batch(groups, metrics, prompts.state_dict(), started, time.time(), min(s.weight_version for s in responses))


def _groups(samples: list[Sample], size: int) -> list[list[Sample]]:
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def evaluate(engine: RolloutEngine, prompts: PromptStream, scorer: Scorer, config: EvalConfig) -> dict[str, float]:
    """Metrics of the held-out prompts, over responses with a verdict.

    `eval/accuracy` and the other sampled metrics are means over `responses_per_prompt` samples per prompt (avg@k).
    `eval/greedy_accuracy` is the share of correct greedy responses, one per prompt. `eval/pass_at_k` is pass@k for
    k = 2, 4, 8, ..., over prompts with that many verdicts.

    Raises:
        RunError: more than `reward.max_unjudged` of the responses have no verdict.
    """
    samples = engine.generate(prompts.held_out, config.responses_per_prompt, config.temperature)
    greedy = engine.generate(prompts.held_out, responses_per_prompt=1, temperature=0.0)
    scorer.score(samples)
    scorer.score(greedy)
    check_judged([*samples, *greedy], scorer.config)
    metrics = sample_metrics(samples, "eval") | pass_rates(_groups(samples, config.responses_per_prompt))
    # An error bar counts prompts, because samples of one prompt are not independent.
    metrics["eval/count"] = float(len(prompts.held_out))
    if judged := [sample for sample in greedy if not sample.unjudged]:
        metrics["eval/greedy_accuracy"] = sum(sample.score >= 1 for sample in judged) / len(judged)
    return metrics
