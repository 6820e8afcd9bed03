"""Samples travel to the ranks that train on them: which bytes, and that they make the same streams."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import everywhere, open_policy, run, run_config

from megatron_aspo.batch import EVERY_RANK, Batch, MicroBatch, Prompt, Sample
from megatron_aspo.config.data import DataConfig
from megatron_aspo.config.load import load_config
from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.data.tokenizer import AsciiTokenizer
from megatron_aspo.errors import UserError
from megatron_aspo.policy.saved_batches import load_batches, load_groups, save_batches, save_groups
from megatron_aspo.ranks import exchange
from megatron_aspo.ranks.exchange import deliver, gather_texts
from megatron_aspo.ranks.gathering import share_ranks
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.rewards.scoring import SCORES, Scorer
from megatron_aspo.rollout.engine import Request, Response
from megatron_aspo.rollout.megatron import EmbeddedEngine
from megatron_aspo.rollout.table import COLUMNS, received_bytes, share

pytestmark = pytest.mark.distributed

EXAMPLES = Path(__file__).parents[2] / "examples"
LAYERS = ((0, 2), (1,), (), (0, 1, 2))
"""Layers whose routes each of four ranks reads."""


def make_whole() -> list[Sample]:
    """Samples of ranks 0, 1 and 3 in turn, with all arrays and lengths from 0."""
    rng = np.random.default_rng(0)
    samples: list[Sample] = []
    for i in range(11):
        size, prompt = i % 5, Prompt(i, "", tuple(range(1 + i % 3)), {})
        samples.append(
            Sample(
                prompt,
                i,
                rng.integers(1 << 20, size=size).astype(np.int32),
                "stop",
                rollout_logprobs=rng.normal(size=size).astype(np.float32),
                text=str(i),
                versions=rng.integers(9, size=size).astype(np.int32),
                routes=rng.integers(256, size=(len(prompt.token_ids) + size - 1, 3, 2)).astype(np.uint8),
                owner=(0, 1, 3)[i % 3],
            )
        )
    return samples


def owned_by(rank: int, samples: list[Sample]) -> list[Sample]:
    return [sample if sample.owner == rank else exchange.without_arrays(sample) for sample in samples]


def arrays_of(sample: Sample) -> list[Any]:
    arrays = sample.token_ids, sample.rollout_logprobs, sample.versions, sample.routes
    return [None if array is None else array.tolist() for array in arrays]


def routed_response(i: int) -> Response:
    """The i-th of the responses that the first ranks of two replicas of two ranks write in turn."""
    tokens = np.arange(65 + i, 68 + i, dtype=np.int32)
    routes = np.arange(4 * 3 * 2, dtype=np.uint8).reshape(4, 3, 2) + i
    return Response(tokens, tokens.astype(np.float32), np.zeros(3, np.int32), routes, "stop")


def exchange_once(config: RunConfig) -> dict[str, Any]:
    """Samples i go to ranks i % 2 and i % 2 + 2, as in two replicas of two ranks."""
    with distributed(config):
        rank = dist.get_rank()
        samples = owned_by(rank, make_whole())
        readers = [(i % 2, i % 2 + 2) for i in range(len(samples))]
        requests = [Request(i, Prompt(i, "", (1, 2), {}), i, 0) for i in range(9)]
        written = [(request, routed_response(request.index)) for request in requests if request.index % 2 * 2 == rank]
        dealt = share(requests, [i % 2 * 2 for i in range(9)], written, AsciiTokenizer(), spread=2)
        before = share_ranks().received
        delivered = deliver(samples, readers, LAYERS)
        return {
            "arrays": [arrays_of(sample) for sample in delivered],
            "counted": share_ranks().received - before,
            "computed": exchange.received_bytes(samples, readers, rank, LAYERS[rank]),
            "texts": gather_texts(samples),
            "dealt": [(sample.owner, arrays_of(sample), sample.text) for sample in dealt],
        }


def test_arrays_reach_their_readers_and_no_one_else() -> None:
    whole = make_whole()
    for rank, result in enumerate(run(4, exchange_once, run_config())):
        for i, (sample, arrays) in enumerate(zip(whole, result["arrays"], strict=True)):
            if i % 2 == rank % 2:
                assert sample.routes is not None
                assert arrays == arrays_of(replace(sample, routes=sample.routes[:, list(LAYERS[rank])]))
            else:
                assert arrays == arrays_of(sample if sample.owner == rank else exchange.without_arrays(sample))
        read = [s for i, s in enumerate(whole) if i % 2 == rank % 2 and s.owner != rank]
        routes = [(s.length - 1) * len(LAYERS[rank]) * 2 for s in read]
        expected = sum(12 * s.response_length for s in read) + sum(-(-size // 4) * 4 for size in routes)
        assert result["counted"] == result["computed"] == expected
        assert result["texts"] == ([] if rank else [str(i) for i in range(11)])
        for i, (owner, arrays, text) in enumerate(result["dealt"]):
            assert owner == i % 2 * 2 + i // 2 % 2  # the responses of a replica in turn to its ranks
            written = routed_response(i)
            routes = np.zeros((0,)) if written.routes is None else written.routes
            own = [written.token_ids.tolist(), written.logprobs.tolist(), None, routes.tolist()]
            assert arrays == (own if rank == owner else [[], [], None, []])
            assert text == ("".join(map(chr, written.token_ids)) if rank == owner else "")


def judge(response: str, row: dict[str, Any]) -> float:
    return len(row["tests"]) / (1 << 20)


def sample_score_and_pack(config: RunConfig) -> dict[str, Any]:
    """A step whose prompts have a megabyte of tests each, without a message of pickled objects."""
    prompts = [Prompt(i, "", (3, 5 + i, 7), {"tests": "t" * (1 << 20)}, "judge") for i in range(6)]
    with open_policy(config) as policy:
        with Scorer(config.data, config.reward, config.rollout, judge) as scorer:
            engine, shared = EmbeddedEngine(policy, config.rollout, AsciiTokenizer(), 1), share_ranks()
            shared.received, gather = 0, dist.all_gather_object
            dist.all_gather_object = None
            samples = engine.generate(prompts, 4, 1.0)
            scorer.score(samples)
            tables = shared.received
            batches = policy.pack(samples)
            arrays = shared.received - tables
            dist.all_gather_object = gather
        readers = [[r for r, place in enumerate(policy.places) if place.dp_rank == d] for d in range(2)]
        read = {i for batch in batches for i in batch.samples}
        whole = [replace(sample, owner=EVERY_RANK) for sample in everywhere(samples)]
        arrived = [readers[policy.dp_rank] if i in read else [] for i in range(len(samples))]
        return {
            "scores": [sample.score for sample in samples],
            "owners": [sample.owner for sample in samples],
            "tables": tables,
            "arrays": (arrays, exchange.received_bytes(samples, arrived, dist.get_rank())),
            "limit": received_bytes(config, 4, 3, 12),
            "same": same(batches, policy.pack(whole)),
            "kept": sum(bool(len(sample.token_ids)) for sample in samples),
        }


def same(one: list[MicroBatch], other: list[MicroBatch]) -> bool:
    names = ("tokens", "labels", "loss_mask", "advantages", "rollout_logprobs", "cu_seqlens")
    pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(one, other, strict=True) for name in names]
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_step_moves_only_tables_and_the_arrays_of_its_replica() -> None:
    rollout = RolloutConfig(prompts_per_step=6, responses_per_prompt=4, max_response_tokens=12)
    config = run_config(ParallelConfig(pipeline=2), rollout=rollout, data=DataConfig(path="-", reward="json:loads"))
    results = run(4, sample_score_and_pack, config)
    for result in results:
        assert result["scores"] == [1.0] * 24
        assert result["owners"] == results[0]["owners"]
        assert [result["owners"].count(rank) for rank in range(4)] == [6] * 4
        assert result["tables"] == 2 * 8 * 24 * (COLUMNS + SCORES)
        counted, computed = result["arrays"]
        assert 0 < counted == computed <= result["limit"] - result["tables"]
        assert result["same"]
        assert result["kept"] == 6  # what was trained on is gone


@pytest.mark.parametrize(("with_routes", "limit"), [(False, 20e6), (True, 250e6)])
def test_a_large_recipe_receives_little(with_routes: bool, limit: float) -> None:
    """671B, 2,048 responses of 8K tokens: with text and prompts for all ranks it was 6.4 GB, or 262 GB with routes."""
    config = load_config(EXAMPLES / "deepseek_v3_671b.yaml", [])
    assert config.rollout.prompts_per_step * config.rollout.responses_per_prompt == 2048
    config = replace(config, train=replace(config.train, router_replay="sampler" if with_routes else "trainer"))
    routes = {"layers": 58, "stage_layers": 4, "top_k": 8}
    sizes = [received_bytes(config, ranks, 512, 8192, **routes) for ranks in (256, 1024, 4096)]
    assert limit / 20 < sizes[0] < limit
    assert sizes == sorted(sizes, reverse=True)


def save_and_keep(folder: Path, config: RunConfig) -> None:
    with distributed(config):
        samples = owned_by(dist.get_rank(), make_whole())
        save_batches(folder, [Batch([samples[:4], samples[4:]], {"rollout/staleness": 1.0}, {"positions": [3]}, 0, 0)])


def load_again(folder: Path, config: RunConfig) -> list[tuple[int, list[Any]]]:
    with distributed(config):
        (batch,) = load_batches(folder)
        return [(sample.owner, arrays_of(sample)) for group in batch.groups for sample in group]


def refusal(folder: Path, config: RunConfig) -> str:
    with distributed(config):
        try:
            load_batches(folder)
        except UserError as error:
            return str(error)
    return ""


def test_saved_batches_are_shared_out_among_any_number_of_ranks(tmp_path: Path) -> None:
    run(4, save_and_keep, tmp_path, run_config())
    files = sorted(path.name for path in (tmp_path / "batches").iterdir())
    assert files == ["rank_00000.pt", "rank_00001.pt", "rank_00003.pt"]
    whole = make_whole()
    for world in (1, 2, 4):
        results = run(world, load_again, tmp_path, run_config())
        for rank, loaded in enumerate(results):
            owners = [owner for owner, _ in loaded]
            assert owners == [[0, 1, 2][i % 3] % world for i in range(11)]
            for sample, owner, (_, arrays) in zip(whole, owners, loaded, strict=True):
                assert arrays == arrays_of(sample if owner == rank else exchange.without_arrays(sample))
    (tmp_path / "batches" / "rank_00001.pt").write_bytes(b"cut off")
    for message in run(2, refusal, tmp_path, run_config()):  # also the rank that does not read the file
        assert re.match(r"cannot read .*rank_00001\.pt.*older checkpoint", message)


def test_a_file_of_a_checkpoint_has_little_but_its_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    routes = rng.integers(0, 256, (1000, 58, 8), dtype=np.uint8)
    tokens, logprobs = rng.integers(0, 150_000, 100_000, dtype=np.int32), rng.normal(size=100_000).astype(np.float32)
    groups = [Response(tokens, logprobs, np.zeros(100_000, np.int32), routes)]
    save_groups(tmp_path, {"groups": groups})
    size = 3 * tokens.nbytes + routes.nbytes
    assert size <= (tmp_path / "groups.pt").stat().st_size <= 1.01 * size
    loaded = load_groups(tmp_path)
    assert loaded is not None
    (response,) = loaded["groups"]
    assert response.routes.tobytes() == routes.tobytes()
    assert response.token_ids.tobytes() == tokens.tobytes()
