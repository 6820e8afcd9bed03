"""`megatron-aspo eval` on one rank: `torchrun ... -m megatron_aspo.commands.evaluate CONFIG.yaml [OPTIONS]`"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_aspo.commands.arguments import run_rank
from megatron_aspo.commands.sampler import open_sampler
from megatron_aspo.config.model import ModelConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.data import PromptStream
from megatron_aspo.data.tokenizer import load_tokenizer
from megatron_aspo.journal.folder import BASE, META_FILE, find_weights
from megatron_aspo.rewards.scoring import Scorer
from megatron_aspo.rollout.batches import evaluate
from megatron_aspo.tools.evaluation.plan import EvaluationPlan
from megatron_aspo.tools.evaluation.responses import collect, problems_hash, write_json
from megatron_aspo.tools.evaluation.results import summarize

VLLM_BATCHES_PER_CHUNK = 4
"""Batches between two writes of the responses; a kill loses at most one chunk. vLLM fills a batch's gaps from the next
one and idles only at the end of a chunk. Other engines get one batch per chunk."""


def run_held_out(config: RunConfig, weights: Path | None) -> None:
    """Print the metrics of the run's held-out prompts as JSON."""
    tokenizer = load_tokenizer(config.model, config.data)
    prompts = PromptStream(config.data, tokenizer, config.max_prompt_tokens)
    # Reward functions run in forks of this process, which are made before it has a model.
    with (
        Scorer(config.data, config.reward, config.rollout) as scorer,
        open_sampler(config, tokenizer, weights) as (_, engine),
    ):
        metrics = evaluate(engine, prompts, scorer, config.eval)
        if dist.get_rank() == 0:
            print(json.dumps({"checkpoint": str(weights or BASE), **metrics}, indent=1))


def run_benchmarks(plan: EvaluationPlan, weights: Path | None) -> None:
    """Write responses, results and a page of every benchmark, and print its scores."""
    config = plan.config
    tokenizer = load_tokenizer(config.model, config.data)
    benchmarks = [(selection, selection.problems(config, tokenizer)) for selection in plan.selections]
    with (
        Scorer(config.data, config.reward, config.rollout) as scorer,
        open_sampler(config, tokenizer, weights) as (_, engine),
    ):
        vllm = config.rollout.engine == "vllm"
        replicas = dist.get_world_size() // (config.rollout.tensor if vllm else config.parallel.model_parallel_size)
        chunk = config.rollout.batch_size * replicas * (VLLM_BATCHES_PER_CHUNK if vllm else 1)
        for selection, problems in benchmarks:
            settings = plan.settings(selection, problems_hash(problems), identity(config.model, weights))
            folder = plan.out / f"{selection.label.replace(':', '-')}-{settings['checkpoint']}"
            problems_per_chunk = max(1, chunk // selection.samples)
            responses = collect(folder, settings, problems, engine, scorer, problems_per_chunk)
            if dist.get_rank() == 0:
                results = summarize(settings, responses)
                write_json(folder / "results.json", results.to_dict())
                (folder / "page.html").write_text(results.page(problems), encoding="utf-8", errors="replace")
                print(f"{results}\n{folder / 'page.html'}", flush=True)


def identity(model: ModelConfig, path: Path | None) -> dict[str, str]:
    """Return name and fingerprint of the weights, equal for two evaluations of the same checkpoint only."""
    if path is None:
        return {"checkpoint": BASE, "weights": model.hf_path or "random"}
    return {"checkpoint": path.name, "weights": hashlib.sha256((path / META_FILE).read_bytes()).hexdigest()[:16]}


def action(arguments: argparse.Namespace, config: RunConfig) -> int:
    """Evaluate on the chosen benchmarks, or else on the held-out prompts."""
    plan = EvaluationPlan.from_arguments(arguments, config)
    weights = find_weights(config, arguments.checkpoint)
    if plan.selections:
        run_benchmarks(plan, weights)
    else:
        run_held_out(config, weights)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_rank("eval", action, argv)


if __name__ == "__main__":
    sys.exit(main())
