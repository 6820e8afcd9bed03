"""One rank of an evaluation. `torchrun --nproc-per-node N -m megatron_aspo.evaluation CONFIG.yaml [--checkpoint PATH]
[--benchmark NAME=FILE ...]`"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_aspo import cli
from megatron_aspo.config import RunConfig, colocated
from megatron_aspo.data import PromptStream
from megatron_aspo.evaluation.held_out import evaluate
from megatron_aspo.evaluation.page import page
from megatron_aspo.evaluation.plan import EvaluationPlan
from megatron_aspo.evaluation.responses import collect, problems_hash, write_json
from megatron_aspo.evaluation.results import Results, print_table, summarize
from megatron_aspo.rewards.scoring import Scorer
from megatron_aspo.rollout.engine import check_engine
from megatron_aspo.run_folder import BASE, META_FILE, find_weights
from megatron_aspo.sampler import open_sampler
from megatron_aspo.tokenizer import load_tokenizer

BATCHES_PER_CHUNK = {"megatron": 1, "vllm": 4}
"""A chunk is what a kill can lose. vLLM fills a batch's gaps from the next, and idles at the end of a chunk only."""


def run_held_out(config: RunConfig, weights: Path | None) -> None:
    """Print the metrics of the run's held-out prompts as JSON."""
    tokenizer = load_tokenizer(config)
    prompts = PromptStream.of(config, tokenizer)
    with open_sampler(config, tokenizer, weights) as (_, engine), Scorer(config) as scorer:
        metrics = evaluate(engine, prompts, scorer, config.eval)
        if dist.get_rank() == 0:
            print(json.dumps({"checkpoint": str(weights or BASE), **metrics}, indent=1))


def run_benchmarks(plan: EvaluationPlan, weights: Path | None) -> None:
    """Write responses, results and a page of every benchmark, and print a table."""
    config = plan.config
    tokenizer = load_tokenizer(config)
    problems = [selection.problems(config, tokenizer) for selection in plan.selections]
    finished: list[Results] = []
    with open_sampler(config, tokenizer, weights) as (_, engine), Scorer(config) as scorer:
        size = config.rollout.tensor if config.rollout.engine == "vllm" else config.parallel.model_parallel_size
        chunk = config.rollout.batch_size * dist.get_world_size() // size * BATCHES_PER_CHUNK[config.rollout.engine]
        for selection, asked in zip(plan.selections, problems, strict=True):
            settings = plan.settings(selection, problems_hash(asked), weights_of(config, weights))
            folder = plan.out / f"{selection.label.replace(':', '-')}-{settings['checkpoint']}"
            in_chunk = max(1, chunk // settings["samples"])
            responses = collect(folder, settings, asked, engine, scorer, in_chunk)
            if dist.get_rank() == 0:
                results = summarize(selection.label, settings, responses, plan.ks_of(selection))
                write_json(folder / "results.json", results.to_dict())
                (folder / "page.html").write_text(page(results, {p.id: p for p in asked}), encoding="utf-8")
                finished.append(results)
                print(folder / "page.html")
    if finished:
        print_table(finished)


def weights_of(config: RunConfig, path: Path | None) -> dict[str, str]:
    """By which the weights of two evaluations are told apart."""
    if path is None:
        return {"checkpoint": BASE, "weights": config.model.hf_path or "random"}
    return {"checkpoint": path.name, "weights": hashlib.sha256((path / META_FILE).read_bytes()).hexdigest()[:16]}


def main(argv: list[str] | None = None) -> int:
    """As the module's docstring says."""

    def run() -> int:
        parser = cli.Parser(prog="megatron_aspo.evaluation")
        cli.add_eval_arguments(parser)
        arguments = cli.parse(parser, argv)
        config = colocated(cli.parse_run_config(arguments))
        check_engine(config.rollout)
        plan = EvaluationPlan.of(arguments, config)
        weights = find_weights(config, arguments.checkpoint)
        if plan.selections:
            run_benchmarks(plan, weights)
        else:
            run_held_out(config, weights)
        return 0

    return cli.exit_code(run, cli.HINTS["eval"])


if __name__ == "__main__":
    sys.exit(main())
