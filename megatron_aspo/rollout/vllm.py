"""vLLM as the rollout engine. All that depends on vLLM's version is in the modules `vllm*.py`.

Every rank of the default process group builds its shard of vLLM (`external_launcher`), beside its shard of the policy
or in a rank that only samples (`remote`). `rollout.tensor` consecutive ranks form one replica, and replicas share the
requests. vLLM never sees a tokenizer: tokens go in and tokens come out. It starts with random weights; `refit` loads
the policy's.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_aspo.batch import Prompt, Sample
from megatron_aspo.config.model import ModelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.data.tokenizer import Tokenizer
from megatron_aspo.errors import RunError
from megatron_aspo.rollout.engine import Enough, Request, Response, deal_out, make_requests
from megatron_aspo.rollout.stops import Stops
from megatron_aspo.rollout.table import share
from megatron_aspo.rollout.turns import Turns
from megatron_aspo.rollout.vllm_routes import VllmRoutes
from megatron_aspo.rollout.vllm_start import in_vllm, model_of, start_vllm, weight_update
from megatron_aspo.rollout.weight_lanes import ReceivedWeights
from megatron_aspo.rollout.weight_sync import (
    Checksum,
    PolicyWeights,
    WeightSyncError,
    check_copies,
    checksum,
    transfer,
)

UPDATE_STEPS = 8
"""Steps after which replicas agree on an update in flight. More would delay it, fewer would make replicas wait."""


class VllmEngine:
    """Samples with vLLM; all ranks make the same calls.

    Attributes:
        writers: of each replica, the ranks that have all it writes.
        replica: this rank's.
        between_steps: called by `advance` on every rank, at least every `UPDATE_STEPS` steps; may call `refit`. Takes
            whether this replica samples, and returns whether any does. Running requests keep their keys and values.
        weight_version: version of vLLM's weights; None before the first `refit` and while it sleeps.
        sent_checksums: checksums of the last `refit`.
        turns: those of the responses with an environment.
    """

    def __init__(
        self,
        source: PolicyWeights | ReceivedWeights,
        model: ModelConfig,
        config: RolloutConfig,
        tokenizer: Tokenizer,
        seed: int,
        *,
        routes: bool = False,
    ) -> None:
        """Start vLLM. With `routes` samples have the experts that its routers chose."""
        self.source = source
        self.config = config
        self.tokenizer = tokenizer
        self.seed = seed
        self.weight_version: int | None = None
        self.between_steps: Callable[[bool], bool] | None = None
        self.turns: Turns | None = None
        self.sent_checksums: dict[str, Checksum] = {}
        self._on_gpu = torch.cuda.is_available()
        self._asleep = False
        self.replica, rank_in_replica = divmod(dist.get_rank(), config.tensor)
        firsts = range(0, dist.get_world_size(), config.tensor)
        self.writers = [list(range(first, first + (1 if routes else config.tensor))) for first in firsts]
        self.spread = config.tensor if routes else 1  # the other ranks get their part of the samples from the first
        self._stops = Stops(tokenizer, config.stop)
        with in_vllm("starting"):
            self._llm = start_vllm(model, tokenizer.vocab_size, config, seed, routes)
            self._routes = VllmRoutes(self._llm, rank_in_replica == 0) if routes else None

    def generate(
        self, prompts: Sequence[Prompt], responses_per_prompt: int, temperature: float, first_group: int = 0
    ) -> list[Sample]:
        """See `RolloutEngine.generate`. Log-probs are those of the distribution sampled from, truncated by top-p and
        top-k if these are set (at temperature 1 when greedy).

        Raises:
            WeightSyncError, RunError: see `advance`.
        """
        requests = make_requests(prompts, responses_per_prompt, first_group)
        local, owners = requests[self.replica :: len(self.writers)], deal_out(self.writers, len(requests))
        responses = zip(local, (self.turns or self).advance(local, temperature), strict=True)
        return share(requests, owners, responses, self.tokenizer, self.spread)

    def advance(self, requests: Sequence[Request], temperature: float, enough: Enough | None = None) -> list[Response]:
        """Write the responses of this replica's requests on from their prefixes; return them in order. Requests that
        have not ended when `enough` holds stay unfinished.

        Raises:
            WeightSyncError: the policy was updated since the last `refit`.
            RunError: vLLM failed.
        """
        if self.weight_version != self.source.weight_version:
            raise WeightSyncError(
                f"vLLM has weights of version {self.weight_version} and the policy version "
                f"{self.source.weight_version}: refit was not called"
            )
        if not requests and self.between_steps is None:
            return []
        with in_vllm("sampling"), self._shared_generator(requests[:1]):
            outputs = self._run(requests, temperature, enough)
            return [self._response(request, output) for request, output in zip(requests, outputs, strict=True)]

    def refit(self) -> None:
        """Load the policy's current weights into vLLM. Collective.

        Raises:
            WeightSyncError: see `transfer`; or vLLM has no place for a tensor; a parameter got none; checksums differ.
        """
        version = self.source.weight_version
        self.weight_version = None
        if self._asleep:
            with in_vllm("waking up"):
                self._llm.wake_up(tags=["weights"])
        with weight_update(self._llm) as load:
            bucket_bytes = self.config.refit_bucket_mb << 20
            self.sent_checksums = transfer(
                self.source.weights(), load, bucket_bytes, self.config.refit_checksum, self.sent_checksums
            )
        if self._asleep:
            with in_vllm("waking up"):
                self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if self.config.refit_checksum:
            check_copies(self.sent_checksums, self.source.sent_checksums, "received and sent by the training ranks")
            check_copies(self.sent_checksums, self._copies(), "sent and in vLLM")
        self.weight_version = version

    def sleep(self) -> None:
        """Free vLLM's key-value cache, and its weights at `sleep_level` 2, until the next `refit`. No-op on a CPU."""
        if self._on_gpu and self.config.sleep_level:
            with in_vllm("going to sleep"):
                self._llm.sleep(level=self.config.sleep_level)
            self._asleep = True
            self.weight_version = None

    def _copies(self) -> dict[str, Checksum]:
        """Checksums of the parameters that vLLM stores as they were sent: neither sharded, nor fused with others, nor
        packed for a CPU's kernels, nor in FP8. `check-rollout` covers the rest by their log-probs."""
        copies: dict[str, Checksum] = {}
        for name, parameter in model_of(self._llm).named_parameters():
            if (sent := self.sent_checksums.get(name)) is None or not parameter.numel():
                continue
            copy = parameter[: sent.shape[0]]  # vLLM pads the vocabulary to a multiple of 64
            if (copy.dtype, copy.shape) == (sent.dtype, sent.shape):
                copies[name] = checksum(copy)
        return copies

    def _run(self, requests: Sequence[Request], temperature: float, enough: Enough | None = None) -> list[Any]:
        """vLLM's output for every request, in order.

        vLLM's own search for stop strings needs a tokenizer and follows other rules. With stop strings vLLM therefore
        returns each token as it is sampled, and a request that has ended by `Stops` is taken out.
        """
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        # Keys and values made by old weights must not serve new ones. Those of the same weights would make responses
        # depend, by rounding, on what was sampled before, and a resumed run would differ.
        if not engine.reset_prefix_cache():
            raise RunError("vLLM did not reset its prefix cache: requests are still running")
        engine.set_weight_version(str(self.weight_version))
        prefixes = [request.written for request in requests]
        for i, (request, prefix) in enumerate(zip(requests, prefixes, strict=True)):
            params = SamplingParams(
                temperature=temperature,
                top_p=self.config.top_p,
                top_k=self.config.top_k,
                seed=_seed(request, self.seed) if self.config.request_seeds else None,
                max_tokens=self.config.max_response_tokens - len(prefix),
                stop_token_ids=sorted(self._stops.end_ids),
                ignore_eos=True,  # the tokenizer's end tokens are among the stop tokens
                logprobs=0,  # of the sampled token
                detokenize=False,
                output_kind=RequestOutputKind.CUMULATIVE if self._stops.strings else RequestOutputKind.FINAL_ONLY,
            )
            # Requests that start after new weights must not use keys and values of the old ones.
            salt = str(i) if self.config.in_flight else None
            engine.add_request(str(i), tokens_input([*request.prompt.token_ids, *prefix], cache_salt=salt), params)
        outputs: dict[int, Any] = {}
        states, window = engine.output_processor.request_states, self._stops.window
        tails = [prefix[request.turn :][-window:] for request, prefix in zip(requests, prefixes, strict=True)]
        is_enough = enough is not None and enough(outputs.keys())
        for step in itertools.count():
            is_sampling = engine.has_unfinished_requests() and not is_enough
            if self.between_steps is not None and (step % UPDATE_STEPS == 0 or not is_sampling):
                others_sample = self.between_steps(is_sampling)
                engine.set_weight_version(str(self.weight_version))
                if not is_sampling and others_sample:
                    continue
            if not is_sampling:
                break
            ended = len(outputs)
            for output in engine.step():
                i, written = int(output.request_id), output.outputs[0].token_ids
                if output.finished:
                    outputs[i] = output
                elif self._stops.ended([*tails[i], *written[-window:]]):
                    (name,) = engine.output_processor.external_req_ids[output.request_id]
                    outputs[i] = self._take_out(name)
            is_enough = enough is not None and len(outputs) > ended and enough(outputs.keys())
        for name, state in list(states.items()):
            outputs[int(state.external_req_id)] = self._take_out(name)
        while engine.engine_core.engine_core.batch_queue:  # steps that vLLM has started ahead, on a GPU
            engine.step()
        return [outputs[i] for i in range(len(requests))]

    def _take_out(self, name: str) -> Any:
        """Abort a request, by vLLM's own name for it; return its output up to now, with the finish reason "abort"."""
        from vllm.v1.engine import FinishReason

        engine = self._llm.llm_engine
        output = engine.output_processor.request_states[name].make_request_output(
            new_token_ids=[], pooling_output=None, finish_reason=FinishReason.ABORT, stop_reason=None
        )
        engine.abort_request([name], internal=True)
        return output

    @contextlib.contextmanager
    def _shared_generator(self, first: Sequence[Request]) -> Iterator[None]:
        """Without `request_seeds` vLLM draws from the process's generators, which it shares with the policy. They are
        seeded here: tensor-parallel ranks must draw alike, and a resumed run must not repeat its first steps' draws.
        Afterwards their previous state is restored."""
        if self.config.request_seeds or not first:
            yield
            return
        seed = _seed(first[0], self.seed, self.source.weight_version, self.replica)
        numpy_state = np.random.get_state()
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if self._on_gpu else []):
            torch.manual_seed(seed)
            np.random.seed(seed)
            try:
                yield
            finally:
                np.random.set_state(numpy_state)

    def _response(self, request: Request, output: Any) -> Response:
        completion, prefix = output.outputs[0], request.written
        token_ids = list(completion.token_ids)
        if not token_ids:  # vLLM had no place for the request
            return request.prefix
        logprobs = [at[token].logprob for at, token in zip(completion.logprobs, token_ids, strict=True)]
        versions = [np.full(span.end - span.start, int(span.version), np.int32) for span in completion.weight_versions]
        is_cut = None if completion.finish_reason == "abort" else "length"
        written = Response(
            token_ids=np.array(token_ids, np.int32),
            logprobs=np.array(logprobs, np.float32),
            versions=np.concatenate(versions),
            routes=self._routes.of(output) if self._routes else None,
            finish_reason="stop" if self._stops.ended([*prefix[request.turn :], *token_ids]) else is_cut,
        )
        return written.after(request.prefix)


def _seed(request: Request, *entropy: int) -> int:
    return int(request.seed_sequence(*entropy, written=len(request.written)).generate_state(1)[0])
