"""`megatron-aspo train` on one rank: `torchrun ... -m megatron_aspo.commands.train CONFIG.yaml [a.b=c ...]`"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_aspo.commands.arguments import run_rank
from megatron_aspo.config.checks import check_together, config_warnings
from megatron_aspo.config.import_path import check_signature
from megatron_aspo.config.run import RunConfig
from megatron_aspo.data import SourceClass
from megatron_aspo.errors import UserError
from megatron_aspo.ranks.gathering import gather_objects
from megatron_aspo.ranks.process_group import distributed, warn
from megatron_aspo.ranks.stop_signals import StopSignals
from megatron_aspo.rewards.scoring import Reward
from megatron_aspo.rollout.choice import EngineClass
from megatron_aspo.rollout.remote import serve
from megatron_aspo.train import train


def run(
    config: RunConfig,
    *,
    rollout: EngineClass | None = None,
    reward: Reward | None = None,
    prompts: SourceClass | None = None,
    report: Callable[[Sequence[Path]], Path] | None = None,
    argv: Sequence[str] = (),
) -> bool:
    """Run one rank of a training run, as `megatron-aspo train` does, with the caller's own parts.

    Every rank calls it with the same arguments: under torchrun, whose environment numbers the ranks, or alone.

    Args:
        rollout: constructor of the engine, like `rollout.engine=module:class`; excludes `rollout.ranks`.
        reward: judge of all responses: a function of a response's text and its prompt's entry, a `Verifier`, or the
            name of one. Default: that of the configured source; "math" with `prompts`.
        prompts: constructor of the source of problems, called with `data.seed` for training and `data.eval_seed` for
            held-out problems. Only prompt_template, chat_template, chat_template_args, the seeds, eval_prompts and
            overlong_prompts of the section `data` apply then.
        report: writes a page about the folder of the finished run, such as `tools.report.write_report`.
        argv: command line to record.

    Returns:
        Whether all steps are done, as `train`.

    Raises:
        UserError: a setting is wrong.
        RunError: the run cannot go on; checkpoints are intact.
    """
    check_together(config)
    if rollout is not None:
        check_signature("rollout", rollout, "policy", "config", "tokenizer", "seed")
        if config.rollout.ranks:
            raise UserError(f"rollout.ranks={config.rollout.ranks} is for vLLM; set it to 0, or pass no rollout")
        for name, off in {"environment": "", "oversample": 1}.items():
            if (value := getattr(config.rollout, name)) != off:
                raise UserError(
                    f"rollout.{name}={value} needs an engine of the package, which continues responses; remove the "
                    "setting, or pass no rollout"
                )
    if prompts is not None:
        check_signature("prompts", prompts, "seed")
        reward = "math" if reward is None else reward
        if config.data.task or config.data.path or config.data.sources:
            raise UserError(f"{config.data.name} conflicts with the prompts that were passed; remove one of them")
        if config.warmup.updates:
            raise UserError(
                f"warmup.updates={config.warmup.updates} needs demonstrations from data.task or data.path, and prompts "
                "were passed; set it to 0"
            )
    with distributed(config) as channel:
        if channel is not None and channel.role == "rollout":
            with StopSignals() as stop:  # the training ranks decide when to stop
                serve(config, channel, reward, prompts, stop)
            return True
        for message in config_warnings(config):
            warn(message)
        done = train(config, argv, channel, rollout=rollout, reward=reward, source=prompts, report=report)
        gather_objects(None)  # srun ends rank 0, which may still upload its log, some time after the first rank's end
        return done


def action(arguments: argparse.Namespace, config: RunConfig) -> int:
    """Train; after the last step, rank 0 writes the report."""
    from megatron_aspo.tools.report import write_report

    run(config, report=write_report, argv=sys.argv)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_rank("train", action, argv)


if __name__ == "__main__":
    sys.exit(main())
