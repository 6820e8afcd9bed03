"""The training loop of ASPO: sample, score, update, and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_aspo.batch import Batch, MicroBatch, Sample
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import TrainConfig
from megatron_aspo.data import PromptStream, SourceClass
from megatron_aspo.data.tokenizer import load_tokenizer
from megatron_aspo.journal.clock import Clock
from megatron_aspo.journal.folder import changed_settings, checkpoints_folder, find_resume, make_folders, read_meta
from megatron_aspo.journal.journal import Journal
from megatron_aspo.journal.trackers import check_trackers
from megatron_aspo.loss.objectives import check_objective
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.metrics import OPTIMIZER_METRICS, UpdateMetrics, measure_rollouts
from megatron_aspo.policy.sample_log import is_logged, log_samples
from megatron_aspo.policy.saved_batches import load_batches, load_groups
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.policy.warmup import warm_up
from megatron_aspo.ranks.channel import Channel
from megatron_aspo.ranks.process_group import warn
from megatron_aspo.ranks.stop_signals import StopSignals, mark_interrupted
from megatron_aspo.rewards.scoring import Reward, Scorer
from megatron_aspo.rollout.batches import Batches, evaluate
from megatron_aspo.rollout.build import build_engine
from megatron_aspo.rollout.choice import EngineClass, check_engine


def train(
    config: RunConfig,
    argv: Sequence[str],
    channel: Channel | None = None,
    *,
    rollout: EngineClass | None = None,
    reward: Reward | None = None,
    source: SourceClass | None = None,
    report: Callable[[Sequence[Path]], Path] | None = None,
) -> bool:
    """Run the training ranks' part of `config.train.steps` steps. Collective.

    Args:
        channel: to the ranks that only generate, if there are any.
        argv, rollout, reward, source, report: as in `commands.train.run`.

    Returns:
        True after the last step; False if SIGUSR1 or SIGTERM stopped the run before.
    """
    check_engine(config.rollout, config.reward)
    check_objective(config.loss)
    check_trackers(config.journal)
    make_folders(config)
    resume_from = find_resume(config)
    done = int(read_meta(resume_from)["step"]) if resume_from else 0
    changed = changed_settings(resume_from, config) if resume_from else []
    scorer = Scorer(config.data, config.reward, config.rollout, reward)
    tokenizer = load_tokenizer(config.model, config.data)
    prompts = PromptStream(config.data, tokenizer, config.max_prompt_tokens, source)
    policy = Policy(config, tokenizer.vocab_size)
    if resume_from:
        checkpoint.check_same_model(resume_from, config.model)
    engine = build_engine(policy, config.rollout, tokenizer, config.seed, channel, rollout)
    engine.sleep()  # warm-up and loading need its memory
    steps, folder = config.train.steps, checkpoints_folder(config)
    resume_step = done if resume_from else None

    with (
        scorer,
        StopSignals() as stop,
        Journal(config, argv, resume_step, dist.get_rank() == 0) as journal,
    ):
        if changed:
            journal.say(f"changed since the last attempt: {', '.join(changed)}")
        if prompts.held_out_overlong:
            journal.say(f"data.overlong_prompts=filter: {prompts.held_out_overlong} held-out prompts are left out")
        if config.warmup.updates and (resume_from is None or config.loss.kl_coef):
            warm_up(policy, config, journal)
        if config.loss.kl_coef:
            policy.keep_reference()
        ahead, groups = resume(resume_from, folder, policy, prompts, journal) if resume_from else ([], None)
        saver = checkpoint.Saver(folder, config.checkpoint)
        batches = Batches(policy, engine, prompts, scorer, config.rollout, done, steps, ahead, groups)
        del ahead, groups  # they hold arrays of batches long after these are used
        engine.refit()

        def evaluate_and_record(step: int) -> None:
            clock = Clock()
            with clock("eval"):
                values = evaluate(engine, prompts, scorer, config.eval)
            journal.record("eval", step, steps, values | {"time/eval": clock["eval"]})

        if config.eval.at_start and not resume_from:
            evaluate_and_record(0)
        if resume_from and done >= steps:
            journal.say(f"{config.run_dir} is complete: {done} of {steps} steps; delete it to train again")

        for step in range(done + 1, steps + 1):
            clock = Clock()
            batch = batches.next(clock)
            engine.sleep()
            groups = split_into_mini_batches(batch.groups, config.mini_batches_per_step)
            mini_batches = [policy.pack([sample for group in part for sample in group]) for part in groups]
            anchored = config.loss.anchor == "rollout"  # old log-probs are measured, not trained on
            if not anchored or is_due(step - 1, config.train.mismatch_every):
                with clock("mismatch" if anchored else "old_logprobs"):
                    set_logprobs(policy, mini_batches)
            if config.loss.kl_coef:
                with clock("ref_logprobs"):
                    set_ref_logprobs(policy, mini_batches)
            values = batch.metrics | measure_rollouts(
                mini_batches if policy.is_last_stage else [], config.rollout, policy.weight_version
            )
            values["optimizer/lr"] = policy.learning_rate
            with clock("update"):
                values |= update(policy, mini_batches, config.train, config.loss)
            policy.release_gradients()
            if is_logged(step, config.train):
                with clock("samples"):
                    log_samples(step, policy, list(zip(groups, mini_batches, strict=True)), tokenizer, journal)
            with clock("refit"):
                engine.refit()
            journal.record("train", step, steps, values | saver.published() | clock.seconds())

            if config.eval.at_end if step == steps else is_due(step, config.eval.every):
                evaluate_and_record(step)
            # The checkpoint comes last: a run killed before it is complete repeats the step and logs it again.
            stopping = step < steps and stop.requested()
            if stopping or step == steps or is_due(step, config.checkpoint.every):
                with clock("checkpoint"):
                    engine.sleep()
                    state = {"prompts": prompts.state_dict()}
                    wait = stopping or step == steps
                    saver.save(step, policy, state, batches.ahead(), batches.in_progress(), wait=wait)
                    if step < steps and not stopping:
                        engine.refit()
                journal.record("checkpoint", step, steps, saver.published() | {"time/checkpoint": clock["checkpoint"]})
            if stopping:
                mark_interrupted(config.run_dir, step)
                journal.stop(f"stopped by a signal: step {step} of {steps} is saved; continue with --resume auto")
                return False
        if report is not None and steps:
            journal.record_report(report)
    return True


def resume(
    path: Path, folder: Path, policy: Policy, prompts: PromptStream, journal: Journal
) -> tuple[list[Batch], dict[str, Any] | None]:
    """Load a checkpoint into policy and prompts, set newer checkpoints in `folder` aside, and return the batches that
    were sampled ahead and the groups in progress. Collective."""
    step, state = checkpoint.load(path, policy)
    for abandoned in checkpoint.abandon_newer(folder, path, step):
        journal.say(f"{abandoned.stem} is newer than the resumed checkpoint; it is now {abandoned.name}")
    prompts.load_state_dict(state["prompts"])
    return load_batches(path), load_groups(path)


def is_due(step: int, every: int) -> bool:
    """Whether a step is one of every `every` steps; 0 is never."""
    return every > 0 and step % every == 0


def split_into_mini_batches(groups: Sequence[list[Sample]], count: int) -> list[list[list[Sample]]]:
    """Return the groups of each of `count` mini-batches, equal in size up to one group, without empty ones."""
    bounds = [round(i * len(groups) / count) for i in range(count + 1)]
    return [list(groups[a:b]) for a, b in pairwise(bounds) if a < b]


def set_logprobs(policy: Policy, mini_batches: Sequence[Sequence[MicroBatch]]) -> None:
    """Set `old_logprobs` of the micro-batches on the last pipeline stage. Collective."""
    for batches in mini_batches:
        for batch, logprobs in zip(batches, policy.logprobs(batches), strict=False):  # none on the other stages
            batch.old_logprobs = logprobs


def set_ref_logprobs(policy: Policy, mini_batches: Sequence[Sequence[MicroBatch]]) -> None:
    """Set `ref_logprobs` of the micro-batches on the last pipeline stage. Collective.

    The reference's weights are loaded once for all mini-batches.
    """
    with policy.reference_weights():
        for batches in mini_batches:
            for batch, logprobs in zip(batches, policy.logprobs(batches), strict=False):
                batch.ref_logprobs = logprobs


def update(
    policy: Policy, mini_batches: Sequence[list[MicroBatch]], config: TrainConfig, loss: PolicyLossConfig
) -> dict[str, float]:
    """Make `config.epochs` passes over the mini-batches, with an optimizer update each; return the mean metrics."""
    metrics, first_epoch = UpdateMetrics(), dict[str, float]()
    for epoch in range(config.epochs):
        for mini_batch in mini_batches:
            policy.train_step(mini_batch, loss, metrics)
        if epoch == 0 and config.epochs > 1:
            means = metrics.reduce()
            first_epoch = {f"{name}_first_epoch": means[name] for name in ("ratio_pos", "ratio_neg") if name in means}
    means = metrics.reduce() | first_epoch
    largest = means.get("log_ratio_max_first", 0.0)
    if loss.anchor == "trainer" and not largest <= config.ratio_tolerance:  # also warns of NaN
        warn(
            f"max |log r| = {largest:.1e} in the step's first mini-batch, before any update: the trainer does not "
            "reproduce its own log-probs (dropout, or nondeterministic kernels), and importance ratios carry that "
            f"error; it exceeds train.ratio_tolerance={config.ratio_tolerance:g}"
        )
    return {f"{'optimizer' if name in OPTIMIZER_METRICS else 'loss'}/{name}": value for name, value in means.items()}
