"""docs/metrics.md lists every metric that runs log, and no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from catalogue import catalogue
from ranks import run, run_config

from megatron_aspo.batch import Prompt
from megatron_aspo.commands import train
from megatron_aspo.config.data import DataConfig
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.model import ModelConfig, ParallelConfig
from megatron_aspo.config.rewards import RewardConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import CheckpointConfig, EvalConfig, OptimizerConfig, TrainConfig, WarmupConfig
from megatron_aspo.journal.log import read_metrics

pytestmark = pytest.mark.distributed

SMALL = run_config(
    # vLLM's attention on a CPU requires a head dimension of at least 32.
    model=ModelConfig(hidden_size=128, ffn_hidden_size=64, max_sequence_length=24, init_std=0.1),
    data=DataConfig(
        task_args={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        prompt_template="{expression} =",
        eval_prompts=4,
    ),
    rollout=RolloutConfig(
        prompts_per_step=4, responses_per_prompt=4, max_response_tokens=4, dynamic_sampling=False, kv_cache_gb=0.05
    ),
    optimizer=OptimizerConfig(lr=1e-3, lr_warmup_updates=0),
    train=TrainConfig(steps=2, mini_batch_prompts=2, epochs=2, max_tokens_per_micro_batch=512, log_samples=0),
    eval=EvalConfig(every=1, responses_per_prompt=1),
    checkpoint=CheckpointConfig(every=1),
)

ALL_LOSS_TERMS = PolicyLossConfig(
    kl_coef=0.1, entropy_quantile=0.8, entropy_coef=1e-3, rollout_correction="mask", rollout_veto=1e-3
)
EVERYTHING = replace(
    SMALL,
    data=replace(SMALL.data, overlong_prompts="filter"),
    reward=RewardConfig(overlong_buffer=2, overlong_filter=True),
    loss=ALL_LOSS_TERMS,
    train=replace(SMALL.train, log_samples=1, log_samples_every=1),
    warmup=WarmupConfig(updates=1, batch_prompts=4),
    checkpoint=CheckpointConfig(every=1, asynchronous=True),
    eval=EvalConfig(every=1, responses_per_prompt=4),
)
STAGES = replace(SMALL, parallel=ParallelConfig(pipeline=2), loss=PolicyLossConfig(objective="gspo"))
EXPERTS = replace(
    SMALL,
    model=replace(SMALL.model, num_experts=4),
    train=replace(SMALL.train, router_replay="trainer", fused_head=False),
)
AHEAD = replace(
    SMALL,
    loss=PolicyLossConfig(anchor="rollout", anchor_band=(0.2, 5.0)),
    train=replace(SMALL.train, mismatch_every=1),
    rollout=replace(SMALL.rollout, engine="vllm", ranks=1, max_staleness=1, oversample=1.5),
)

TURNS = replace(
    SMALL,
    rollout=replace(
        SMALL.rollout,
        environment="test_documented_metrics:Next",
        stop=tuple("abcdefghijklmnopqrstuvwxyz"),
        max_response_tokens=12,
    ),
)

RUNS = {
    "everything": (1, EVERYTHING),
    "stages": (2, STAGES),
    "experts": (1, EXPERTS),
    "ahead": (2, AHEAD),
    "turns": (1, TURNS),
}


class Next:
    """An environment without a score."""

    def reset(self, prompt: Prompt) -> None: ...

    def step(self, response: str) -> str:
        return ">"


def by_length(response: str, row: dict[str, Any]) -> float:
    """Accepts about half of the responses that random weights write, so that advantages have both signs."""
    return float(sum(map(ord, response)) % 2)


def train_here(config: RunConfig) -> None:
    torch.manual_seed(0)
    train.run(config, reward=by_length)


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Names of the metrics logged by every run."""
    folder = tmp_path_factory.mktemp("runs")
    names: dict[str, set[str]] = {}
    for name, (ranks, config) in RUNS.items():
        cache = replace(config.warmup, cache_dir=str(folder / "cache"))
        run(ranks, train_here, replace(config, name=name, output_dir=str(folder), warmup=cache))
        records = read_metrics(Path(folder) / name)
        names[name] = set().union(*records) - {"step", "phase", "time"}
    return names


@pytest.mark.engines
def test_the_page_names_what_runs_log_and_nothing_else(logged: dict[str, set[str]]) -> None:
    named = catalogue()
    assert len(named) == len(set(named))
    everything = set[str]().union(*logged.values())
    assert sorted(everything - set(named)) == [], "logged, and not on the page"
    assert sorted(set(named) - everything) == [], "on the page, and logged by none of these runs"


@pytest.mark.engines
def test_conditional_metrics_are_conditional(logged: dict[str, set[str]]) -> None:
    """Metrics whose row names a condition are logged only under that condition."""
    extra = logged["everything"] - logged["stages"]
    assert {name.removesuffix("_pos").removesuffix("_neg") for name in extra} == {
        *("eval/pass_at_2", "eval/pass_at_4"),
        "loss/kl",
        "data/overlong_prompts",
        "rollout/overlong_filtered",
        "time/samples",
        "time/ref_logprobs",
        "time/checkpoint_published",
    }
    assert logged["experts"] == logged["stages"]
    assert logged["turns"] - logged["stages"] == {"rollout/turns", "eval/turns"}
    signs = ("", "_pos", "_neg")
    assert logged["ahead"] - logged["stages"] == {
        *("rollout/staleness", "rollout/staleness_updates", "rollout/groups_in_progress"),
        *("rollout/staleness_tokens", "rollout/staleness_tokens_max", "rollout/older_tokens"),
        *("time/remote_rollout", "time/remote_reward", "time/mismatch"),
        *(f"mismatch/{name}_{age}" for name in ("logprob_diff", "kl") for age in ("current", "older")),
        *(f"loss/{name}{sign}" for name in ("update_logprob_diff", "anchor_cut") for sign in signs),
    }
    assert logged["stages"] - logged["ahead"] == {
        *("time/reward", "time/old_logprobs", "loss/rollout_ratio_max"),
        *(f"loss/rollout_{name}{sign}" for name in ("ratio", "cut", "dropped") for sign in signs),
    }
