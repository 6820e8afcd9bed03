"""The embedded engine: samples from the training model itself, in the same ranks, under any layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from megatron.core.transformer.utils import set_model_to_sequence_parallel
from torch import Tensor

from megatron_aspo.config import RolloutConfig
from megatron_aspo.errors import UserError
from megatron_aspo.gathering import Gathering
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.rollout.stops import Stops
from megatron_aspo.tokenizer import Tokenizer
from megatron_aspo.types import Prompt, Sample


@dataclass(frozen=True)
class _Request:
    """One response to write. Its random numbers depend on the seed, the prompt and `replica` alone, so the same
    responses come out whatever the batch, the layout or the point of resumption."""

    index: int
    prompt: Prompt
    group: int
    replica: int


class EmbeddedEngine:
    """Samples with Megatron's static key-value cache; all ranks call `generate` together."""

    def __init__(self, policy: Policy, config: RolloutConfig, tokenizer: Tokenizer, seed: int) -> None:
        if policy.model.config.multi_latent_attention:
            raise UserError("the training model does not sample with latent attention; set rollout.engine=vllm")
        self.policy = policy
        self.config = config
        self.tokenizer = tokenizer
        self.seed = seed
        self._stops = Stops(tokenizer, config.stop)
        self._gather = Gathering()

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], responses_per_prompt: int, temperature: float, first_group: int = 0
    ) -> list[Sample]:
        """`responses_per_prompt` samples of every prompt, in order, the same list on every rank.

        Args:
            temperature: 0 takes the most likely token (the lowest id among equals).
            first_group: number of the first prompt's group; the next prompts count on from it.

        The log-probs returned are of softmax(logits / temperature) (temperature 1 when greedy) over the whole
        vocabulary, also when top-p truncates what is sampled from.
        """
        requests = [
            _Request(i * responses_per_prompt + k, prompt, first_group + i, k)
            for i, prompt in enumerate(prompts)
            for k in range(responses_per_prompt)
        ]
        # Neighbours in length share a batch; of n ranks each takes every n-th request of the sorted list.
        by_length = sorted(requests, key=lambda request: (len(request.prompt.token_ids), request.index))
        mine = by_length[self.policy.rollout_group.rank() :: self.policy.rollout_group.size()]
        written: list[tuple[int, Sample]] = []
        with self._inference_mode():
            for start in range(0, len(mine), self.config.batch_size):
                batch = mine[start : start + self.config.batch_size]
                written += zip((request.index for request in batch), self._decode(batch, temperature), strict=True)
        # Ranks that share the model wrote the same ones.
        samples = dict(pair for part in self._gather(written) for pair in part)
        return [samples[i] for i in range(len(requests))]

    def refit(self) -> None:
        """The weights are the policy's own."""

    def sleep(self) -> None:
        """Nothing is kept between calls of `generate`."""

    def _decode(self, requests: Sequence[_Request], temperature: float) -> list[Sample]:
        """Decode a batch. All rows start at position 0: the shortest prompt is prefilled, and rows with a longer one
        are fed its tokens while others sample already. So no row needs left padding or a mask."""
        prompts = [request.prompt.token_ids for request in requests]
        device = self.policy.device
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        longest = int(lengths.max())
        total = longest + self.config.max_response_tokens
        tokens = torch.full((len(prompts), total), self.tokenizer.pad_id, dtype=torch.long, device=device)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
        uniform = self._uniform_numbers(requests) if temperature > 0 else None
        logprobs = torch.zeros(tokens.shape, device=device)
        written = torch.zeros_like(lengths)
        stopped = torch.zeros_like(lengths, dtype=torch.bool)

        context = StaticInferenceContext(len(prompts), total)
        for position in range(int(lengths.min()), total):
            logits = self._forward(tokens[:, context.sequence_len_offset : position], context)
            context.sequence_len_offset = position
            context.enable_decode_mode()
            chosen, logprob = self._choose(logits, temperature, uniform, (position - lengths).clamp(min=0))
            active = (position >= lengths) & ~stopped & (written < self.config.max_response_tokens)
            tokens[:, position] = torch.where(active, chosen, tokens[:, position])
            logprobs[:, position] = torch.where(active, logprob, 0.0)
            written += active
            stopped |= self._ended(tokens[:, : position + 1], active, written)
            if bool((stopped | (written == self.config.max_response_tokens)).all()):
                break
        return [
            self._sample(request, tokens[row], logprobs[row], int(written[row]), bool(stopped[row]))
            for row, request in enumerate(requests)
        ]

    def _sample(self, request: _Request, tokens: Tensor, logprobs: Tensor, written: int, stopped: bool) -> Sample:
        first = len(request.prompt.token_ids)
        token_ids = tuple(tokens[first : first + written].tolist())
        return Sample(
            prompt=request.prompt,
            group=request.group,
            token_ids=token_ids,
            finish_reason="stop" if stopped else "length",
            weight_version=self.policy.updates,
            rollout_logprobs=logprobs[first : first + written].cpu().numpy(),
            text=self.tokenizer.decode(token_ids),
        )

    def _forward(self, tokens: Tensor, context: StaticInferenceContext) -> Tensor | None:
        """[b, s] -> logits of the last position [b, V] on the last pipeline stage, None on the others."""
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
        self, logits: Tensor | None, temperature: float, uniform: Tensor | None, step: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Next tokens [b] and their log-probs [b], on every stage."""
        if logits is not None:
            u = None if uniform is None else uniform.gather(1, step.clamp(max=uniform.shape[1] - 1)[:, None])[:, 0]
            chosen, logprob = sample_tokens(logits, temperature, self.config.top_p, u)
            both = torch.stack([chosen.double(), logprob.double()])
            # Rounding need not be the same on two ranks (CUDA's cumulative sum, a token's place among those of an
            # expert), and one other token would part them for good. Tensor-parallel ranks on CPU do agree.
            twins = self.policy.twin_group
            if twins.size() > 1 and (both.is_cuda or self.policy.config.parallel.expert > 1):
                dist.broadcast(both, src=dist.get_global_rank(twins, 0), group=twins)
        else:
            both = torch.empty(2, len(step), dtype=torch.float64, device=step.device)
        if self.policy.stages > 1:
            dist.broadcast(both, src=self.policy.last_stage, group=self.policy.pp_group)
        return both[0].long(), both[1].float()

    def _ended(self, tokens: Tensor, active: Tensor, written: Tensor) -> Tensor:
        """[b, s] -> [b]: the token just written ends the response; False where none was written."""
        last = tokens[:, -1]
        ended = torch.stack([last == i for i in self._stops.end_ids] + [torch.zeros_like(active)]).any(0) & active
        if self._stops.strings:
            counts = written.clamp(max=self._stops.window).tolist()
            for row, recent in enumerate(tokens[:, -self._stops.window :].tolist()):
                ended[row] |= bool(active[row]) and self._stops.ended(recent[len(recent) - counts[row] :])
        return ended

    def _uniform_numbers(self, requests: Sequence[_Request]) -> Tensor:
        """[b, max_response_tokens] float64 in [0, 1), from each request's own generator."""
        # Held-out prompts have negative ids, which a seed sequence does not take.
        rows = [
            np.random.default_rng([self.seed, r.prompt.id & 0xFFFFFFFF, r.prompt.id < 0, r.replica]).random(
                self.config.max_response_tokens
            )
            for r in requests
        ]
        return torch.from_numpy(np.stack(rows)).to(self.policy.device)

    @contextlib.contextmanager
    def _inference_mode(self) -> Iterator[None]:
        """Megatron's inference mode, and no sequence or context parallelism: one position cannot be split."""
        wrapped = self.policy.model
        wrapped.eval()
        inner: Any = wrapped.module
        while hasattr(inner, "module"):
            inner = inner.module
        sequence_parallel = wrapped.config.sequence_parallel
        if sequence_parallel:
            set_model_to_sequence_parallel(inner, False)
        group = self.policy.cp_group
        # Transformer Engine's attention takes its input for a part of the sequence as long as it has a group.
        parted: list[Any] = [
            m for m in inner.modules() if hasattr(m, "set_context_parallel_group") and group.size() > 1
        ]
        for attention in parted:
            attention.set_context_parallel_group(None, None, None, attention.cp_comm_type)
        try:
            with InferenceMode.active():
                yield
        finally:
            for attention in parted:
                attention.set_context_parallel_group(
                    group, dist.get_process_group_ranks(group), type(attention).cp_stream, attention.cp_comm_type
                )
            if sequence_parallel:
                set_model_to_sequence_parallel(inner, True)


def sample_tokens(logits: Tensor, temperature: float, top_p: float, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """Next tokens [b] and their log-probs [b] from logits [b, V], by inverting the distribution function.

    Args:
        temperature: 0 takes the most likely token and ignores `uniform`.
        top_p: keep the fewest most likely tokens whose probabilities reach this sum.
        uniform: [b] float64 in [0, 1).
    """
    logprobs = torch.log_softmax(logits / temperature if temperature > 0 else logits, dim=-1)
    if temperature == 0 or uniform is None:
        chosen = logits.argmax(-1)
    else:
        p = logprobs.double().exp()
        order = None
        if top_p < 1:
            p, order = p.sort(dim=-1, descending=True, stable=True)
            p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
        cumulative = p.cumsum(-1)
        chosen = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
        chosen = chosen.clamp(max=p.shape[-1] - 1)
        chosen = chosen[:, 0] if order is None else order.gather(1, chosen)[:, 0]
    return chosen, logprobs.gather(1, chosen[:, None])[:, 0]
