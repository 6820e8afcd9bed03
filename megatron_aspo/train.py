"""The training loop. `torchrun --nproc-per-node N -m megatron_aspo.train CONFIG.yaml [a.b=c ...]`"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from itertools import pairwise

import torch.distributed as dist

from megatron_aspo.channel import Channel
from megatron_aspo.config import RunConfig
from megatron_aspo.config_checks import check_together, config_warnings
from megatron_aspo.data import PromptStream, SourceClass
from megatron_aspo.distributed import distributed, warn
from megatron_aspo.errors import UserError
from megatron_aspo.evaluation.held_out import evaluate
from megatron_aspo.import_path import check_signature
from megatron_aspo.journal import Clock, Journal
from megatron_aspo.loss.custom import check_objective
from megatron_aspo.mismatch import measure_mismatch
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.trainer import Policy, UpdateMetrics
from megatron_aspo.preemption import StopSignals, mark_interrupted
from megatron_aspo.rewards.scoring import Reward, Scorer
from megatron_aspo.rollout.engine import EngineClass, build_engine, check_engine
from megatron_aspo.run_folder import changed_settings, checkpoints_folder, find_resume, make_folders, read_meta
from megatron_aspo.sample_log import SampleLog
from megatron_aspo.sampling import build_batches
from megatron_aspo.serve import serve
from megatron_aspo.tokenizer import load_tokenizer
from megatron_aspo.types import Batch, MicroBatch, Sample
from megatron_aspo.warmup import warm_up


def run(
    config: RunConfig,
    *,
    rollout: EngineClass | None = None,
    reward: Reward | None = None,
    prompts: SourceClass | None = None,
    argv: Sequence[str] = (),
) -> bool:
    """This rank's part of a training run, as `megatron-aspo train` does it, with parts of the caller's own.

    Every rank calls it alike: under torchrun, whose environment tells the ranks, or alone.

    Args:
        rollout: makes the engine, as `rollout.engine=module:class` does; not with `rollout.ranks`.
        reward: judges all responses: a function of a response's text and its prompt's entry, a `Verifier`, or the name
            of one. Default: that of the configured source, and "math" for `prompts`.
        prompts: makes the source of problems, from a seed: `data.seed` for training, `data.eval_seed` for held-out
            problems. Of the section `data` only prompt_template, chat_template, the seeds, eval_prompts and
            overlong_prompts then count.
        argv: the command, for the record.

    Returns:
        Whether all steps are done, as `train`.

    Raises:
        UserError: a mistake that a line can tell.
        RunError: the run cannot go on; what has been saved is intact.
    """
    check_together(config)
    if rollout is not None:
        check_signature("rollout", rollout, "policy", "config", "tokenizer", "seed")
        if config.rollout.ranks:
            raise UserError(f"rollout.ranks={config.rollout.ranks} is for vLLM; set it to 0, or pass no rollout")
    if prompts is not None:
        check_signature("prompts", prompts, "seed")
        reward = "math" if reward is None else reward
        if config.data.task or config.data.path or config.data.sources:
            raise UserError(f"{config.data.name} stands beside the prompts that were passed; remove one of them")
        if config.warmup.updates:
            raise UserError(
                f"warmup.updates={config.warmup.updates} takes demonstrations from data.task or data.path, and prompts "
                "were passed; set it to 0"
            )
    with distributed(config) as channel:
        if channel is not None and channel.role == "rollout":
            with StopSignals(config.checkpoint.stop_signals):  # when to stop is the training ranks' to say
                serve(config, channel, reward, prompts)
            return True
        for message in config_warnings(config):
            warn(message)
        return train(config, list(argv), channel, rollout=rollout, reward=reward, source=prompts)


def train(
    config: RunConfig,
    argv: list[str],
    channel: Channel | None = None,
    *,
    rollout: EngineClass | None = None,
    reward: Reward | None = None,
    source: SourceClass | None = None,
) -> bool:
    """Run `config.train.steps` steps of ASPO: sample, score, compare within groups, update, and again.

    `channel` leads to the rollout ranks, if there are any; the others are as in `run`.

    Returns:
        Whether all steps are done; False where a signal of `config.checkpoint.stop_signals` came before.
    """
    check_engine(config.rollout)
    check_objective(config.loss)
    make_folders(config)
    resume_from = find_resume(config)
    resume_step = int(read_meta(resume_from)["step"]) if resume_from else None
    changed = changed_settings(resume_from, config) if resume_from else []
    scorer = Scorer(config, reward)
    tokenizer = load_tokenizer(config)
    prompts = PromptStream.of(config, tokenizer, source)
    policy = Policy(config, tokenizer.vocab_size)
    if resume_from:
        checkpoint.check_same_model(resume_from, policy)
    engine = build_engine(policy, config.rollout, tokenizer, config.seed, channel, rollout)
    steps = config.train.steps

    with (
        scorer,
        StopSignals(config.checkpoint.stop_signals) as stop,
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
        sampled_ahead: list[Batch] = []
        if resume_from:
            _, state = checkpoint.load(resume_from, policy)
            prompts.load_state_dict(state["prompts"])
            sampled_ahead = checkpoint.load_batches(resume_from)
        batches = build_batches(engine, prompts, scorer, config, resume_step or 0, sampled_ahead)
        engine.refit()
        if not resume_from:
            journal.record("eval", 0, steps, evaluate(engine, prompts, scorer, config.eval))

        if resume_step is not None and resume_step >= steps:
            journal.say(f"{config.run_dir} is complete: {resume_step} of {steps} steps; delete it to train again")
        sample_log = SampleLog(policy, tokenizer, config, journal)
        clock = Clock()
        for step in range((resume_step or 0) + 1, steps + 1):
            batch = batches.next(clock)
            engine.sleep()
            mini_batches = [policy.pack(samples) for samples in split_into_mini_batches(batch.groups, config)]

            with clock("old_logprobs"):
                for mini_batch in mini_batches:
                    policy.fill_logprobs(mini_batch, "old_logprobs")
                    if config.loss.kl_coef:
                        policy.fill_logprobs(mini_batch, "ref_logprobs")

            sample_log.before_updates(step, batch.groups, clock)
            values = batch.metrics
            values |= {f"mismatch/{name}": value for name, value in measure_mismatch(mini_batches).items()}
            values["optimizer/lr"] = policy.learning_rate
            with clock("update"):
                values |= update(policy, mini_batches, config)
            policy.release_gradients()
            sample_log.after_updates(step, clock)
            with clock("refit"):
                engine.refit()

            journal.record("train", step, steps, values | clock.seconds())

            clock = Clock()  # what follows is timed with the next step
            if step == steps or (config.eval.every and step % config.eval.every == 0):
                with clock("eval"):
                    journal.record("eval", step, steps, evaluate(engine, prompts, scorer, config.eval))
            # Last of all: a run that is killed before does the step again, and logs it again.
            stopping = step < steps and stop.requested()
            if stopping or step == steps or (config.checkpoint.every and step % config.checkpoint.every == 0):
                with clock("checkpoint"):
                    state = {"prompts": prompts.state_dict()}
                    keep = config.checkpoint.keep
                    checkpoint.save(checkpoints_folder(config), step, policy, state, keep, batches.ahead())
            if stopping:
                mark_interrupted(config.run_dir, step)
                journal.say(f"stopped by a signal: step {step} of {steps} is saved; continue with --resume auto")
                return False
    return True


def split_into_mini_batches(groups: Sequence[list[Sample]], config: RunConfig) -> list[list[Sample]]:
    """As many mini-batches as a full step has, of whole groups and equal size up to one; empty ones are left out."""
    count = math.ceil(config.rollout.prompts_per_step / config.train.mini_batch_prompts)
    bounds = [round(i * len(groups) / count) for i in range(count + 1)]
    parts = (groups[a:b] for a, b in pairwise(bounds))
    return [[sample for group in part for sample in group] for part in parts if part]


def update(policy: Policy, mini_batches: Sequence[list[MicroBatch]], config: RunConfig) -> dict[str, float]:
    """`epochs` passes over the mini-batches, one optimizer update each; the metrics are means over all of them."""
    metrics = UpdateMetrics()
    for _ in range(config.train.epochs):
        for mini_batch in mini_batches:
            policy.train_step(mini_batch, config.loss, metrics)
    means = metrics.reduce()
    largest = means.get("log_ratio_max_first", 0.0)
    if not largest <= config.train.ratio_tolerance:  # NaN too
        warn(
            f"max |log r| = {largest:.1e} on the step's first mini-batch, where the policy is still the old one: the "
            "trainer does not reproduce its own log-probs (dropout, or nondeterministic kernels); importance "
            f"ratios carry that error. train.ratio_tolerance={config.train.ratio_tolerance:g} is what is accepted"
        )
    return {f"{'optimizer' if name.startswith('grad_norm') else 'loss'}/{name}": value for name, value in means.items()}


def main(argv: list[str] | None = None) -> int:
    """One rank of a training run."""
    from megatron_aspo import cli

    def action() -> int:
        parser = cli.Parser(prog="megatron_aspo.train")
        cli.add_run_arguments(parser)
        config = cli.parse_run_config(cli.parse(parser, argv))
        done = run(config, argv=sys.argv if argv is None else argv)
        if done and config.train.steps and os.environ.get("RANK", "0") == "0":  # of warm-up alone there is no report
            from megatron_aspo.report import print_summary, write_report

            png, html = write_report([config.run_dir])
            print_summary([config.run_dir])
            print(f"report: {html}\nplots:  {png}")
        return 0

    return cli.exit_code(action, cli.HINTS["train"])


if __name__ == "__main__":
    sys.exit(main())
