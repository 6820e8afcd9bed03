"""Responses that are interrupted and go on: their tokens, log-probs and versions; batches of unfinished groups."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import VOCAB, run
from test_vllm import LLAMA, STRINGS, Syllables, build, make_prompts, vllm_config
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_aspo.config.run import RunConfig
from megatron_aspo.policy.cpu import cuda as cpu
from megatron_aspo.policy.sample_log import score
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.rollout.engine import Request, Response, make_requests
from megatron_aspo.rollout.megatron import EmbeddedEngine
from megatron_aspo.rollout.stops import Stops
from megatron_aspo.rollout.vllm import VllmEngine
from megatron_aspo.rollout.weight_sync import PolicyWeights, llama_config
from megatron_aspo.train import set_logprobs

pytestmark = pytest.mark.engines


def after(count: int) -> Any:
    """End when `count` requests have ended."""

    def enough(ended: Collection[int]) -> bool:
        return len(ended) >= count

    return enough


def continuing(requests: Sequence[Request], responses: Sequence[Response]) -> list[Request]:
    """Requests for the unfinished responses."""
    pairs = zip(requests, responses, strict=True)
    return [replace(request, prefix=response) for request, response in pairs if response.finish_reason is None]


def joined(first: Sequence[Response], second: Sequence[Response]) -> list[Response]:
    """All responses after the unfinished ones have been continued."""
    rest = iter(second)
    return [response if response.finish_reason else next(rest) for response in first]


def trainer_logprobs(policy: Policy, requests: Sequence[Request], responses: Sequence[Response]) -> list[Tensor]:
    pairs = zip(requests, responses, strict=True)
    samples = [response.sample(request.prompt, 0, "") for request, response in pairs]
    packed = policy.pack(samples)
    set_logprobs(policy, [packed])
    return [row[: len(s.token_ids)] for row, s in zip(score(policy, samples, packed)[1], samples, strict=True)]


def content(responses: Sequence[Response]) -> list[tuple[Any, ...]]:
    return [(r.token_ids.tobytes(), r.logprobs.tobytes(), r.versions.tobytes(), r.finish_reason) for r in responses]


def interrupt_and_continue(config: RunConfig) -> dict[str, Any]:
    with distributed(config):
        policy, engine = build(config)
        engine.refit()
        requests = make_requests(make_prompts(6), 4, 0)
        result: dict[str, Any] = {"prompts": [request.prompt for request in requests]}
        result["whole"] = engine.advance(requests, 1.0)
        result["cut"] = cut = engine.advance(requests, 1.0, after(5))
        rest = continuing(requests, cut)
        result["same weights"] = joined(cut, engine.advance(rest, 1.0))
        result["again"] = joined(cut, engine.advance(rest, 1.0))
        result["twice"] = joined(
            cut, joined(once := engine.advance(rest, 1.0, after(4)), engine.advance(continuing(rest, once), 1.0))
        )
        result["old"] = trainer_logprobs(policy, requests, result["same weights"])

        embedded = EmbeddedEngine(policy, config.rollout, engine.tokenizer, 1)
        result["embedded whole"] = embedded.advance(requests, 1.0)
        result["embedded cut"] = cut_there = embedded.advance(requests, 1.0, after(5))
        result["embedded"] = joined(cut_there, embedded.advance(continuing(requests, cut_there), 1.0))

        engine._stops, engine.tokenizer = Stops(Syllables(), STRINGS), Syllables()
        engine.config = replace(config.rollout, max_response_tokens=40)
        many, result["boundaries"] = make_requests(make_prompts(16), 4, 0), []
        written, asked, turn = [request.prefix for request in many], list[Request](), Request.turn
        setattr(Request, "turn", property(lambda request: asked.append(request) or turn.__get__(request)))  # noqa: B010
        result["requests"] = 0
        while waiting := continuing(many, written):
            written = joined(written, engine.advance(waiting, 1.0, after(3)))
            result["requests"] += len(waiting)
            result["boundaries"].append([len(response.token_ids) for response in written])
        result["syllables"], result["turns looked up"] = written, len(asked)
        setattr(Request, "turn", turn)  # noqa: B010
        engine._stops, engine.config = Stops(embedded.tokenizer, ()), config.rollout

        old = [parameter.detach().clone() for parameter in policy.model.parameters()]
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        policy.weight_version += 3
        engine.refit()
        result["new weights"] = joined(cut, engine.advance(rest, 1.0))
        result["new logprobs"] = trainer_logprobs(policy, requests, result["new weights"])
        with torch.no_grad():
            for parameter, value in zip(policy.model.parameters(), old, strict=True):
                parameter.copy_(value)
        result["old logprobs"] = trainer_logprobs(policy, requests, result["new weights"])
        result["in flight"] = update_in_flight(config, policy, engine, requests)
        return result


def update_in_flight(
    config: RunConfig, policy: Policy, engine: VllmEngine, requests: Sequence[Request]
) -> list[tuple[Response, Tensor]]:
    """Responses during which the weights change, with log-probs of the old model's keys and values for the tokens that
    it has read, and of the new model for the others."""
    models: list[Any] = []

    def keep() -> None:
        models.append(LlamaForCausalLM(LlamaConfig(**llama_config(config.model, VOCAB))).eval())
        models[-1].load_state_dict(dict(PolicyWeights(policy).weights()))

    def between_steps(is_sampling: bool) -> bool:
        calls.append(1)
        if len(calls) == 2:
            # The policy beside vLLM needs the patches for a CPU; in rollout ranks there are none.
            for mode in cpu._active:
                mode.__enter__()
            with torch.no_grad():
                for parameter in policy.model.parameters():
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
            policy.weight_version += 1
            keep()
            engine.refit()
            for mode in reversed(cpu._active):
                mode.__exit__(None, None, None)
        return is_sampling

    calls: list[int] = []
    engine.config = replace(config.rollout, ranks=1, max_staleness=1, in_flight=True)
    keep()
    engine.refit()
    engine.between_steps = between_steps
    responses = engine.advance(requests, 1.0)
    result: list[tuple[Response, Tensor]] = []
    for request, response in zip(requests, responses, strict=True):
        prompt, tokens = list(request.prompt.token_ids), response.token_ids.tolist()
        written = int((response.versions == response.versions.min()).sum()) if len(set(response.versions)) > 1 else None
        first, last = models if written else (models[int(response.versions[0] > 3)],) * 2
        read = len(prompt) + (written or 1) - 1  # the new model reads the last token of the old one
        with cpu.suspended(), torch.no_grad():
            old = first(torch.tensor([[*prompt, *tokens][:read]]))
            new = last(torch.tensor([[*prompt, *tokens][read:]]), past_key_values=old.past_key_values)
        logits = torch.cat([old.logits, new.logits], 1)[0, len(prompt) - 1 : -1]
        result.append((response, logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]))
    return result


def test_a_response_goes_on_after_its_tokens_so_far() -> None:
    config = vllm_config(LLAMA, batch_size=8)
    (result,) = run(1, interrupt_and_continue, config)
    whole, cut = result["whole"], result["cut"]
    lengths = [len(response.token_ids) for response in cut if response.finish_reason is None]
    assert 0 < lengths.count(0) < len(lengths)  # requests for which vLLM had no place yet
    assert len(lengths) <= len(whole) - 5
    for a, b in zip(whole, cut, strict=True):
        assert a.token_ids[: len(b.token_ids)].tolist() == b.token_ids.tolist()
        assert a.logprobs[: len(b.token_ids)] == pytest.approx(b.logprobs, abs=1e-5)
        assert b.finish_reason in (None, a.finish_reason)
    assert content(result["again"]) == content(result["same weights"])
    for name in ("same weights", "twice", "new weights"):
        assert all(r.finish_reason for r in result[name])
        assert max(len(r.token_ids) for r in result[name]) == 12
    for response, logprobs in zip(result["same weights"], result["old"], strict=True):
        assert response.logprobs == pytest.approx(logprobs.numpy(), abs=1e-5)

    spans = [(r.versions == 0).sum() for r in result["new weights"]]
    assert any(0 < n < len(r.token_ids) for n, r in zip(spans, result["new weights"], strict=True))
    old_part, new_part, gap = 0.0, 0.0, 0.0
    for response, old, new in zip(result["new weights"], result["old logprobs"], result["new logprobs"], strict=True):
        assert response.versions.tolist() == sorted(response.versions.tolist())
        assert set(response.versions.tolist()) <= {0, 3}
        is_old, written = response.versions == 0, response.logprobs
        old_part = max([old_part, *abs(old.numpy() - written)[is_old]])
        new_part = max([new_part, *abs(new.numpy() - written)[~is_old]])
        gap = max([gap, *abs(old.numpy() - written)[~is_old]])
    assert old_part < 1e-5
    assert new_part < 1e-5
    assert gap > 0.05

    mixed = 0
    for response, logprobs in result["in flight"]:
        assert response.logprobs == pytest.approx(logprobs.numpy(), abs=1e-5)
        mixed += len(set(response.versions.tolist())) == 2
    assert 4 <= mixed <= 8  # those that were running

    # The embedded engine's draws depend on the position alone.
    cut_there = result["embedded cut"]
    assert sum(r.finish_reason is None for r in cut_there) > 5
    for a, b in zip(result["embedded whole"], result["embedded"], strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
        assert a.finish_reason == b.finish_reason

    stops, crossed = Stops(Syllables(), STRINGS), 0
    for i, response in enumerate(result["syllables"]):
        tokens = response.token_ids.tolist()
        ends = [n for n in range(1, len(tokens) + 1) if stops.ended(tokens[:n])]
        assert ends == ([len(tokens)] if response.finish_reason == "stop" else [])
        assert response.finish_reason == "stop" or len(tokens) == 40
        before = max(lengths[i] for lengths in [[0] * 64, *result["boundaries"]] if lengths[i] < len(tokens))
        crossed += response.finish_reason == "stop" and not stops.ended(tokens[before:])
    assert crossed > 0  # a stop string over a boundary
    # Before vLLM's first step and after the last one, not for every token.
    assert result["requests"] <= result["turns looked up"] <= 2 * result["requests"]
