"""A rank's run, phase by phase: it starts, trains a step, saves, and resumes.

`train.train` decides the order, and whether vLLM is awake beside a phase.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from megatron_aspo.batch import MicroBatch, Prompt, Sample
from megatron_aspo.config.run import RunConfig
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.metrics import UpdateMetrics
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.rollout.weight_lanes import packed
from megatron_aspo.rollout.weight_sync import PolicyWeights, transfer
from megatron_aspo.tools.rehearsal.run import PROGRESS, Job
from megatron_aspo.tools.rehearsal.tape import Tape

AWAKE, ASLEEP, REFIT = "awake", "asleep", "refit"


class Phases:
    """The phases of one rank. Checkpoints go to `folder`.

    Attributes:
        engine: name of the phase -> state of a vLLM on this GPU; empty without one.
        micro_batches, first_micro_batches: of an update, and of the first one.
        parameters: of this rank's part of the model.
    """

    def __init__(self, job: Job, tape: Tape, folder: Path) -> None:
        self.job, self.tape, self.config, self.folder = job, tape, job.config, folder
        self.engine: dict[str, str] = {}
        self.micro_batches = self.first_micro_batches = self.parameters = 0

    def run(self) -> None:
        """Start, make a step and save; and resume in the place of another process."""
        config = self.config
        policy = self._start("build")
        with self._phase("engine start", AWAKE):
            pass
        with self._phase("pack", ASLEEP):
            batches = policy.pack(self._samples(policy))
        self._logprobs(policy, batches)
        self._updates(policy, batches)
        with self._phase("release gradients", ASLEEP):
            policy.release_gradients()
        if config.model.hf_path or config.rollout.engine == "vllm":
            with self._phase("refit", REFIT):
                self._refit(PolicyWeights(policy))
        with self._phase("rollout", AWAKE):
            pass
        if not self.job.save:
            return
        saver = checkpoint.Saver(self.folder, config.checkpoint)
        with self._phase("checkpoint save", ASLEEP):
            saver.save(1, policy, {}, (), wait=False)
        if config.checkpoint.asynchronous:
            with self._phase("update beside the save", ASLEEP):
                policy.train_step(batches, config.loss, UpdateMetrics())
                saver.published()
        del policy
        if not self.job.resume:
            return
        end_process()
        policy = self._start("build to resume")
        with self._phase("checkpoint load", ASLEEP):
            checkpoint.load(self.folder / "step_000001", policy)
        with self._phase("update after resume", ASLEEP):
            policy.train_step(batches, config.loss, UpdateMetrics())

    @contextlib.contextmanager
    def _phase(self, name: str, engine: str = "") -> Iterator[None]:
        rollout = self.config.rollout
        self.engine[name] = engine if rollout.engine == "vllm" and not rollout.ranks else ""
        print(f"{PROGRESS}rank {self.job.rank}{self.job.place}: {name}", file=sys.stderr, flush=True)
        with self.tape.phase(name):
            yield

    def _start(self, name: str) -> Policy:
        with self._phase(name):
            policy = Policy(self.config, self.job.vocab_size)
            if self.config.loss.kl_coef:
                policy.keep_reference()
        self.parameters = sum(parameter.numel() for parameter in policy.parameters())
        return policy

    def _logprobs(self, policy: Policy, batches: list[MicroBatch]) -> None:
        with self._phase("old log-probs", ASLEEP):
            for batch, logprobs in zip(batches, policy.logprobs(batches), strict=False):
                batch.old_logprobs = logprobs
        if self.config.loss.kl_coef:
            with self._phase("reference log-probs", ASLEEP), policy.reference_weights():
                for batch, logprobs in zip(batches, policy.logprobs(batches), strict=False):
                    batch.ref_logprobs = logprobs

    def _updates(self, policy: Policy, batches: list[MicroBatch]) -> None:
        """Two updates of unequal length are a straight line: seconds of any number of micro-batches."""
        self.micro_batches = len(batches)
        few = min(self.config.parallel.pipeline, len(batches) - self.config.parallel.rounds)
        self.first_micro_batches = max(1, few)
        for i in range(2):
            with self._phase("update" if i else "first update", ASLEEP):
                policy.train_step(
                    batches if i else batches[: self.first_micro_batches], self.config.loss, UpdateMetrics()
                )

    def _refit(self, source: PolicyWeights) -> None:
        """Gather the weights for the engine on this GPU, or this rank's share for those that only sample."""
        rollout = self.config.rollout
        bucket, checksum = rollout.refit_bucket_mb << 20, rollout.refit_checksum
        if rollout.ranks:
            deque(packed(source.share(), bucket, torch.device("cuda"), checksum), maxlen=0)
        else:
            transfer(source.weights(), lambda bucket: None, bucket, checksum, {})

    def _samples(self, policy: Policy) -> list[Sample]:
        config = self.config
        parallel, train = config.parallel, config.train
        replicas = self.job.world // (parallel.tensor * parallel.pipeline * parallel.context)
        length = config.model.max_sequence_length
        per_stream = max(1, train.max_tokens_per_micro_batch // length) if train.packing else 1
        samples = make_samples(config, self.job.micro_batches * replicas * per_stream)
        if train.router_replay == "sampler":
            layers = 1 + max((layer for place in policy.places for layer in place.routed_layers), default=0)
            k, experts = policy.transformer.moe_router_topk, policy.transformer.num_moe_experts
            even = (np.arange((length - 1) * k) % experts).astype(np.uint8).reshape(-1, 1, k)
            for sample in samples:
                sample.routes = np.broadcast_to(even, (length - 1, layers, k))
        return samples


def end_process() -> None:
    """Forget what Megatron-Core and Transformer Engine keep as long as a process lives."""
    engine: Any = importlib.import_module("transformer_engine.pytorch")
    engine.quantization.FP8GlobalStateManager.reset()  # it has process groups
    engine.cpp_extensions.gemm.get_cublas_workspace.cache_clear()
    engine.module.base._dummy_wgrads.clear()
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_global_memory_buffer()


def make_samples(config: RunConfig, count: int) -> list[Sample]:
    """Samples with the longest prompts and responses."""
    response = config.rollout.max_response_tokens
    prompt = (1,) * (config.model.max_sequence_length - response)
    return [
        Sample(
            Prompt(i, "", prompt, {}),
            i // config.rollout.responses_per_prompt,
            np.ones(response, np.int32),
            "stop",
            rollout_logprobs=np.zeros(response, np.float32),
            advantage=1.0 if i % 2 else -1.0,
        )
        for i in range(count)
    ]
