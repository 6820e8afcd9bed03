"""The embedded engine: samples from the training model itself, in the same ranks, at any layout."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.utils import set_model_to_sequence_parallel
from torch import Tensor

from megatron_aspo.batch import Prompt, Sample
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.data.tokenizer import Tokenizer
from megatron_aspo.errors import UserError
from megatron_aspo.policy.cpu import cuda as cpu
from megatron_aspo.policy.cpu.layers import PackedAttention
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.rollout.engine import Enough, Request, Response, deal_out, make_requests
from megatron_aspo.rollout.stops import Stops
from megatron_aspo.rollout.table import share
from megatron_aspo.rollout.turns import Turns

_ADJUST = "_adjust_key_value_for_inference"
"""Method of Megatron's attention that stores keys and values."""


class KeyValueCache(StaticInferenceContext):
    """Megatron's static cache, [longest sequence, rows, groups, d] for each layer, of rotated keys."""

    def keep(self, rows: Tensor) -> None:
        """Leave the other rows out of the batch."""
        for memory in self.key_value_memory_dict.values():
            for values in memory:
                values[: self.sequence_len_offset, : len(rows)] = values[: self.sequence_len_offset, rows]


def extend_cache(
    attention: Any, context: KeyValueCache, query: Tensor, key: Tensor, value: Tensor, angles: Any, *_: Any
) -> tuple[Tensor, Tensor, Tensor, None, Any, None]:
    """Store the keys and values of new positions, [s, b, groups, d]; return the rotated query and all keys and values.

    It replaces Megatron's method, whose cache has keys before their rotation, so that every token rotates all of them.
    """
    start, end, rows = context.sequence_len_offset, context.sequence_len_offset + len(key), key.shape[1]
    if angles is not None:
        options = {"config": attention.config, "mscale": attention._yarn_concentration_factor}
        query, key = (
            apply_rotary_pos_emb(x, each[start:end], cp_group=attention.pg_collection.cp, **options)
            for x, each in zip((query, key), angles, strict=True)
        )
    memory = context.key_value_memory_dict
    if attention.layer_number not in memory:
        shape = (context.max_sequence_length, context.max_batch_size, *key.shape[2:])
        memory[attention.layer_number] = (key.new_empty(shape), value.new_empty(shape))
    keys, values = memory[attention.layer_number]
    keys[start:end, :rows], values[start:end, :rows] = key, value
    return query, keys[:end, :rows], values[:end, :rows], None, attention.attn_mask_type, None


class EmbeddedEngine:
    """Samples with Megatron's static key-value cache. All ranks call `generate` together.

    Attributes:
        writers: the ranks of each replica, which write the same responses.
        replica: this rank's.
        spread: 1, because all writers of a response have all of it.
        turns: those of the responses with an environment.
    """

    spread = 1
    turns: Turns | None = None

    def __init__(self, policy: Policy, config: RolloutConfig, tokenizer: Tokenizer, seed: int) -> None:
        if policy.transformer.multi_latent_attention:
            raise UserError("the training model does not sample with latent attention; set rollout.engine=vllm")
        if policy.transformer.experimental_attention_variant:
            raise UserError("the training model does not sample with gated delta nets; set rollout.engine=vllm")
        self.policy = policy
        self.config = config
        self.tokenizer = tokenizer
        self.seed = seed
        self.replica, replicas = policy.rollout_group.rank(), range(policy.rollout_group.size())
        self.writers = [[rank for rank, place in enumerate(policy.places) if place.replica == n] for n in replicas]
        self._stops = Stops(tokenizer, config.stop)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], responses_per_prompt: int, temperature: float, first_group: int = 0
    ) -> list[Sample]:
        """See `RolloutEngine.generate`. Greedy sampling takes the lowest token id among equals.

        Log-probs are those of softmax(logits / temperature), at temperature 1 when greedy, over the whole vocabulary:
        top-p truncates only what is sampled.
        """
        requests = make_requests(prompts, responses_per_prompt, first_group)
        # Neighbours in length share a batch. Each of n replicas takes every n-th request of the sorted list.
        by_length = sorted(requests, key=lambda request: (len(request.prompt.token_ids), request.index))
        dealt = {
            request.index: rank for request, rank in zip(by_length, deal_out(self.writers, len(by_length)), strict=True)
        }
        owners = [dealt[i] for i in range(len(requests))]
        local = by_length[self.replica :: len(self.writers)]
        responses = zip(local, (self.turns or self).advance(local, temperature), strict=True)
        return share(requests, owners, responses, self.tokenizer)

    @torch.no_grad()
    def advance(self, requests: Sequence[Request], temperature: float, enough: Enough | None = None) -> list[Response]:
        """Write the responses of this replica's requests on from their prefixes; return them in order. Requests that
        have not ended when `enough` holds stay unfinished. A continued response is the one without interruption."""
        # Neighbours in length share a batch.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt.token_ids) + len(requests[i].written))
        responses = [request.prefix for request in requests]
        ended: set[int] = set()
        with self._inference_mode():
            for start in range(0, len(order), self.config.batch_size):
                batch = order[start : start + self.config.batch_size]

                def is_enough(rows: Collection[int], batch: Sequence[int] = batch) -> bool:
                    return enough is not None and enough(ended | {batch[row] for row in rows})

                for i, response in zip(
                    batch, self._decode([requests[i] for i in batch], temperature, is_enough), strict=True
                ):
                    responses[i] = response
                ended.update(i for i in batch if responses[i].finish_reason)
        return responses

    def refit(self) -> None:
        """No-op: the weights are the policy's own."""

    def sleep(self) -> None:
        """No-op: nothing is kept between calls of `generate`."""

    def _decode(self, requests: Sequence[Request], temperature: float, enough: Enough) -> list[Response]:
        """Decode a batch without left padding or a mask.

        All rows start at position 0. The shortest prompt is prefilled; longer ones are fed token by token while other
        rows already sample. A response's beginning counts as prompt. Rows that have ended leave the batch when they are
        a quarter of it.
        """
        reasons: dict[int, Literal["stop", "length"]] = {}
        if enough(reasons):
            return [request.prefix for request in requests]
        device, limit = self.policy.device, self.config.max_response_tokens
        responses = [request.written for request in requests]
        prompts = [[*request.prompt.token_ids, *written] for request, written in zip(requests, responses, strict=True)]
        starts = torch.tensor([len(request.prompt.token_ids) for request in requests], device=device)
        total = int(starts.max()) + limit
        tokens = torch.full((len(prompts), total), self.tokenizer.pad_id, dtype=torch.long, device=device)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
        uniform = self._uniform_numbers(requests) if temperature > 0 else None
        logprobs: list[list[float]] = [[] for _ in prompts]

        context = KeyValueCache(len(prompts), total)
        rows = list(range(len(prompts)))  # the request in each row of the batch
        for position in range(min(map(len, prompts)), total):
            if 4 * len(live := [n for n, row in enumerate(rows) if row not in reasons]) <= 3 * len(rows):
                kept = torch.tensor(live, device=device)
                tokens, starts, rows = tokens[kept], starts[kept], [rows[n] for n in live]
                uniform = None if uniform is None else uniform[kept]
                context.keep(kept)
            logits = self._forward(tokens[:, context.sequence_len_offset : position], context)
            context.sequence_len_offset = position
            context.enable_decode_mode()
            step = (position - starts).clamp(0, limit - 1)
            drawn = None if uniform is None else uniform.gather(1, step[:, None])
            chosen, values = self._choose(logits, temperature, drawn, len(rows))
            column, ended = tokens[:, position].tolist(), len(reasons)
            for n, (row, token, logprob) in enumerate(zip(rows, chosen.tolist(), values.tolist(), strict=True)):
                if position < len(prompts[row]) or row in reasons:
                    continue
                column[n] = token
                responses[row].append(token)
                logprobs[row].append(logprob)
                if self._stops.ended(responses[row][requests[row].turn :]):
                    reasons[row] = "stop"
                elif len(responses[row]) == limit:
                    reasons[row] = "length"
            tokens[:, position] = torch.tensor(column, device=device)
            if len(reasons) == len(requests) or (len(reasons) > ended and enough(reasons)):
                break
        return [
            Response(
                np.array(responses[row][len(request.prefix.token_ids) :], np.int32),
                np.array(logprobs[row], np.float32),
                np.full(len(logprobs[row]), self.policy.weight_version, np.int32),
                finish_reason=reasons.get(row),
            ).after(request.prefix)
            for row, request in enumerate(requests)
        ]

    def _forward(self, tokens: Tensor, context: KeyValueCache) -> Tensor | None:
        """[b, s] -> logits of the last position, [b, V], on the last pipeline stage; None on other stages."""
        model: Any = self.policy.model.module
        rows, length = tokens.shape
        hidden_shape = (length, rows, self.policy.model.config.hidden_size)
        if not self.policy.is_first_stage:
            received = torch.empty(hidden_shape, dtype=self.policy.model.config.pipeline_dtype, device=tokens.device)
            dist.recv(received, src=self.policy.previous_stage)
            model.set_input_tensor(received)
        start = context.sequence_len_offset
        output = model(
            input_ids=tokens,
            position_ids=torch.arange(start, start + length, device=tokens.device).expand(rows, length),
            attention_mask=None,
            inference_context=context,
            runtime_gather_output=True,
        )
        if self.policy.is_last_stage:
            return output[:, -1, : self.policy.vocab_size].float()  # without the padding
        dist.send(output.contiguous(), dst=self.policy.next_stage)
        return None

    def _choose(
        self, logits: Tensor | None, temperature: float, uniform: Tensor | None, rows: int
    ) -> tuple[Tensor, Tensor]:
        """Sample the next tokens [b], with their log-probs [b]; the same on every stage."""
        if logits is not None:
            chosen, logprob = sample_tokens(logits, temperature, self.config.top_p, uniform)
            pair = torch.stack([chosen.double(), logprob.double()])
            # Ranks may round differently (CUDA's cumulative sum, a token's place in an expert's batch), and after one
            # differing token they would never agree again. Tensor-parallel ranks on CPU do agree.
            twins = self.policy.twin_group
            if twins.size() > 1 and (pair.is_cuda or self.policy.config.parallel.expert > 1):
                dist.broadcast(pair, src=dist.get_global_rank(twins, 0), group=twins)
        else:
            pair = torch.empty(2, rows, dtype=torch.float64, device=self.policy.device)
        if self.policy.stages > 1:
            dist.broadcast(pair, src=self.policy.last_stage, group=self.policy.pp_group)
        return pair[0].long(), pair[1].float()

    def _uniform_numbers(self, requests: Sequence[Request]) -> Tensor:
        """[b, max_response_tokens] float64 in [0, 1), from each request's own generator."""
        generators = (np.random.default_rng(request.seed_sequence(self.seed)) for request in requests)
        rows = [generator.random(self.config.max_response_tokens) for generator in generators]
        return torch.from_numpy(np.stack(rows)).to(self.policy.device)

    @contextlib.contextmanager
    def _inference_mode(self) -> Iterator[None]:
        """Megatron's inference mode without sequence and context parallelism: a single position cannot be split."""
        (wrapped,) = self.policy.whole_chunks()
        wrapped.eval()
        inner: Any = wrapped.module
        while hasattr(inner, "module"):
            inner = inner.module
        with contextlib.ExitStack() as undo:
            if wrapped.config.sequence_parallel:
                set_model_to_sequence_parallel(inner, False)
                undo.callback(set_model_to_sequence_parallel, inner, True)
            # Transformer Engine's attention would make a plan for every length of the keys, tenths of a second each,
            # and treat its input as a shard of the sequence.
            for module in list(inner.modules()):
                attention = getattr(module, "core_attention", None)
                if attention is not None:
                    setattr(module, _ADJUST, functools.partial(extend_cache, module))
                    undo.callback(delattr, module, _ADJUST)
                if not isinstance(attention, PackedAttention | None):
                    undo.callback(setattr, module, "core_attention", attention)
                    module.core_attention = PackedAttention(module.config, pg_collection=module.pg_collection)
            undo.enter_context(InferenceMode.active())
            # No call asks for "cuda" here, and the mode that would answer costs a quarter of a CPU's time.
            undo.enter_context(cpu.suspended())
            yield


def sample_tokens(logits: Tensor, temperature: float, top_p: float, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sample next tokens [b], with their log-probs [b], from logits [b, V] by inverting the distribution function.

    Args:
        temperature: 0 is greedy.
        top_p: keep the fewest most likely tokens whose probabilities reach this sum.
        uniform: [b, 1] float64 in [0, 1); None is greedy.
    """
    logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    if uniform is None:
        chosen = logits.argmax(-1, keepdim=True)
    else:
        p, order = logprobs.double().exp(), None
        if top_p < 1:
            p, order = p.sort(dim=-1, descending=True, stable=True)
            p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
        cumulative = p.cumsum(-1)
        chosen = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp(max=p.shape[-1] - 1)
        chosen = chosen if order is None else order.gather(1, chosen)
    return chosen[:, 0], logprobs.gather(1, chosen)[:, 0]
