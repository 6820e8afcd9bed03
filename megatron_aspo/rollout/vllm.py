"""vLLM as the rollout engine. Everything that depends on vLLM's version is here.

Every rank of the default process group builds its part of vLLM (`external_launcher`), beside its part of the policy or
in a rank of its own (`remote`): `rollout.tensor` consecutive ranks are one replica, and the replicas share the
requests. Tokens go in and tokens come out; vLLM never sees a tokenizer. Its weights come from the policy alone, by
`refit`, so it starts with random ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_aspo.config import RMS_NORM_EPSILON, ModelConfig, RolloutConfig
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.gathering import Gathering
from megatron_aspo.policy import cpu
from megatron_aspo.policy.hf_folder import copy_configuration
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.rollout.stops import Stops
from megatron_aspo.tokenizer import Tokenizer
from megatron_aspo.types import Prompt, Sample
from megatron_aspo.weight_sync import (
    Checksum,
    SyncReport,
    Weight,
    WeightSource,
    WeightSync,
    WeightSyncError,
    check_copies,
    checksum,
)

_BACKEND = "megatron_aspo"

_QUANTIZATION = {
    "none": {},
    # Its scheme of one scale a tensor has no kernel on a CPU. Routers, in "gate", would be among the linear layers.
    "fp8": {"quantization": "fp8_per_channel", "quantization_config": {"ignore": ["*gate"]}},
}
"""vLLM's settings for ours."""


@dataclass(frozen=True)
class _Request:
    index: int
    prompt: Prompt
    group: int
    replica: int

    def seed(self, seed: int) -> int:
        """Of the run's seed, the prompt and the response's number alone, so that neither batch nor layout matter."""
        # Held-out prompts have negative ids, which a seed sequence does not take.
        entropy = [seed, self.prompt.id & 0xFFFFFFFF, self.prompt.id < 0, self.replica]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])


class VllmEngine:
    """Samples with vLLM; all ranks make the same calls.

    Attributes:
        weight_version: the policy's number of updates at the last `refit`; None before the first.
        last_sync: what the last `refit` did.
    """

    def __init__(
        self, source: WeightSource, model: ModelConfig, config: RolloutConfig, tokenizer: Tokenizer, seed: int
    ) -> None:
        self.source = source
        self.config = config
        self.tokenizer = tokenizer
        self.seed = seed
        self.weight_version: int | None = None
        self.last_sync: SyncReport | None = None
        self._on_gpu = torch.cuda.is_available()
        self._asleep = False
        self._sync = WeightSync(config.refit_bucket_mb << 20, config.refit_checksum)
        self._replica, self._rank_in_replica = divmod(dist.get_rank(), config.tensor)
        self._replicas = dist.get_world_size() // config.tensor
        self._stops = Stops(tokenizer, config.stop)
        self._gather = Gathering()
        with _in_vllm("starting"):
            self._llm = _start(model, tokenizer.vocab_size, config, seed)

    def generate(
        self, prompts: Sequence[Prompt], responses_per_prompt: int, temperature: float, first_group: int = 0
    ) -> list[Sample]:
        """`responses_per_prompt` samples of every prompt, in order, the same list on every rank; temperature 0 is
        greedy. The log-probs are of the distribution that was sampled from, truncated by top-p and top-k if those are
        set (at temperature 1 when greedy).

        Raises:
            WeightSyncError: the policy was updated since the last `refit`.
            RunError: vLLM failed.
        """
        if self.weight_version != self.source.version:
            raise WeightSyncError(
                f"vLLM has the weights of update {self.weight_version}, the policy those of {self.source.version}: "
                "refit was not called"
            )
        version = self._llm.llm_engine.get_weight_version()
        if version != str(self.weight_version):
            raise WeightSyncError(f"vLLM has the weights of update {version}, not {self.weight_version} as it should")
        requests = [
            _Request(i * responses_per_prompt + k, prompt, first_group + i, k)
            for i, prompt in enumerate(prompts)
            for k in range(responses_per_prompt)
        ]
        mine = requests[self._replica :: self._replicas]
        with _in_vllm("sampling"):
            outputs = self._run(mine, temperature) if mine else []
        written = [self._sample(request, output) for request, output in zip(mine, outputs, strict=True)]
        samples: list[Sample | None] = [None] * len(requests)
        everyones = self._gather(written if self._rank_in_replica == 0 else [])
        for replica, part in enumerate(everyones[:: self.config.tensor]):
            samples[replica :: self._replicas] = part
        assert None not in samples
        return samples  # type: ignore[return-value]

    def refit(self) -> None:
        """Give vLLM the policy's current weights. Collective.

        Raises:
            WeightSyncError: see `WeightSync.run`; or vLLM has a parameter that no tensor was for.
        """
        version = self.source.version
        self.weight_version = None
        with _in_vllm("taking weights"):
            if self._asleep:
                self._llm.wake_up(tags=["weights"])
            self._llm.start_weight_update()
        self.last_sync = self._sync.run(self.source.weights(), self._load)
        with _in_vllm("taking weights"):
            self._llm.finish_weight_update(weight_version=str(version))
            if self._asleep:
                self._llm.wake_up(tags=["kv_cache"])
                self._asleep = False
        if self.config.refit_checksum:
            if self.source.sent_checksums:
                check_copies(self.source.sent_checksums, self.last_sync.checksums, "that the rollout ranks received")
            check_copies(self.last_sync.checksums, self._copies(), "in vLLM")
        self.weight_version = version

    def sleep(self) -> None:
        """Free vLLM's key-value cache, and its weights at `sleep_level` 2, until the next `refit`. Nothing on a CPU."""
        if self._on_gpu and self.config.sleep_level:
            with _in_vllm("going to sleep"):
                self._llm.sleep(level=self.config.sleep_level)
            self._asleep = True
            self.weight_version = None

    def _copies(self) -> dict[str, Checksum]:
        """Of vLLM's parameters that are as they came: neither split over ranks, nor joined with others, nor packed
        for a CPU's kernels, nor in FP8. The rest `check-rollout` judges by their log-probs."""
        assert self.last_sync is not None
        layout, sent = self._sync.layout, self.last_sync.checksums

        def copies(model: torch.nn.Module) -> dict[str, Checksum]:
            # Of a vocabulary vLLM makes a multiple of 64, with zeros.
            whole = {name: p for name, p in model.named_parameters() if name in sent and p.numel()}

            def as_sent(name: str, p: torch.nn.Parameter) -> bool:
                shape, dtype = layout[name]
                return p.dtype == dtype and p.shape[0] >= shape[0] and p.shape[1:] == shape[1:]

            return {name: checksum(p) for name, p in whole.items() if as_sent(name, p)}

        return self._llm.apply_model(copies)[0]

    def _load(self, bucket: list[Weight]) -> None:
        with _in_vllm("taking weights"):
            self._llm.update_weights({"update_info": {"weights": bucket}})

    def _run(self, requests: Sequence[_Request], temperature: float) -> list[Any]:
        """What vLLM wrote for every request, in order.

        Its own search for stop strings needs a tokenizer, and has rules of its own. So with stop strings vLLM hands out
        each token as it is sampled, and a request that has ended by our rule is aborted.
        """
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        # Keys and values that old weights made must not serve new ones. Those of the same weights would make responses
        # depend, by rounding, on what was sampled before, and a resumed run would not be the same.
        if not engine.reset_prefix_cache():
            raise RunError("vLLM did not reset its prefix cache: requests are still running")
        for i, request in enumerate(requests):
            params = SamplingParams(
                temperature=temperature,
                top_p=self.config.top_p if temperature > 0 else 1.0,
                top_k=self.config.top_k if temperature > 0 else 0,
                seed=request.seed(self.seed) if temperature > 0 else None,
                max_tokens=self.config.max_response_tokens,
                stop_token_ids=sorted(self._stops.end_ids),
                ignore_eos=True,  # vLLM's own idea of it; ours is among the stops
                logprobs=0,  # of the sampled token
                detokenize=False,
                output_kind=RequestOutputKind.CUMULATIVE if self._stops.strings else RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(i), tokens_input(list(request.prompt.token_ids)), params)
        outputs: list[Any] = [None] * len(requests)
        while engine.has_unfinished_requests():
            for output in engine.step():
                outputs[int(output.request_id)] = output
                if not output.finished and self._stops.ended(output.outputs[0].token_ids):
                    engine.abort_request([output.request_id])
        return outputs

    def _sample(self, request: _Request, output: Any) -> Sample:
        completion = output.outputs[0]
        token_ids = tuple(completion.token_ids)
        logprobs = [at[token].logprob for at, token in zip(completion.logprobs, token_ids, strict=True)]
        return Sample(
            prompt=request.prompt,
            group=request.group,
            token_ids=token_ids,
            finish_reason="stop" if self._stops.ended(token_ids) else "length",
            weight_version=self.source.version,
            rollout_logprobs=np.array(logprobs, dtype=np.float32),
            text=self.tokenizer.decode(token_ids),
        )


def _start(model: ModelConfig, vocab_size: int, config: RolloutConfig, seed: int) -> Any:
    """vLLM with random weights."""
    on_cpu = not torch.cuda.is_available()
    _prepare_environment(on_cpu)
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    _register_transfer(on_cpu)
    if on_cpu:
        _check_head_size(_head_size(model))
        _name_shared_memory()
    with tempfile.TemporaryDirectory() as folder:
        try:
            llm = LLM(
                model=_model_folder(model, vocab_size, Path(folder)),
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype=model.dtype,
                **_QUANTIZATION[config.quantization],
                max_model_len=model.max_sequence_length,
                max_num_seqs=config.batch_size,
                kv_cache_memory_bytes=int(config.kv_cache_gb * (1 << 30)),
                tensor_parallel_size=config.tensor,
                distributed_executor_backend="external_launcher",
                enforce_eager=on_cpu,
                # A prompt that is read in two parts draws a random number too many, and on a CPU vLLM fails there.
                enable_chunked_prefill=not on_cpu,
                enable_sleep_mode=not on_cpu and config.sleep_level > 0 and not config.ranks,
                logprobs_mode="processed_logprobs",
                seed=seed,
                weight_transfer_config=WeightTransferConfig(backend=_BACKEND),
                disable_log_stats=True,
            )
        except ValueError as error:
            raise UserError(f"vLLM refuses this configuration: {error}") from error
    # When it is collected vLLM would destroy the default process group, which is not its own.
    core: Any = llm.llm_engine.engine_core
    core._finalizer.detach()
    llm.init_weight_transfer_engine({"init_info": {}})
    return llm


def _prepare_environment(on_cpu: bool) -> None:
    """What vLLM reads from the environment; to be set before it is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, where the weights are
    defaults = {"VLLM_LOGGING_LEVEL": "ERROR", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    defaults["MASTER_PORT"] = "0"  # the process group is there already
    if on_cpu:
        # vLLM would bind its threads to cores that the trainer of another rank uses as well.
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # Compiling the log-probs of sampled tokens takes a C++ compiler and up to 15 seconds, and gains nothing.
        torch.compiler.set_stance("force_eager")
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _check_head_size(size: int) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    supported = CPUAttentionBackend.get_supported_head_sizes()
    if size not in supported:
        raise UserError(
            f"vLLM's attention on a CPU has no kernel for heads of {size}, only of {', '.join(map(str, supported))}; "
            "change model.num_attention_heads or model.hidden_size, or set rollout.engine=megatron"
        )


def _name_shared_memory() -> None:
    """Give the shared memory of tensor-parallel ranks a name of its own. By vLLM's under an external launcher two jobs
    on a host collide, and so does one with what a killed job has left."""
    from vllm.distributed.device_communicators import cpu_communicator

    name = [uuid.uuid4().hex]
    dist.broadcast_object_list(name)
    shared: Any = cpu_communicator._CPUSHMDistributed
    theirs = shared.make_group_name
    shared.make_group_name = staticmethod(lambda communicator: name[0] + theirs(communicator).replace("/", ""))


def _register_transfer(on_cpu: bool) -> None:
    """Make vLLM's weight-transfer API take tensors of the same process."""
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    if _BACKEND in WeightTransferEngineFactory._registry:
        return

    @dataclass
    class InitInfo(WeightTransferInitInfo):
        pass

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):
        weights: list[Weight]

    class InProcess(WeightTransferEngine[InitInfo, UpdateInfo]):
        init_info_cls = InitInfo
        update_info_cls = UpdateInfo

        def init_transfer_engine(self, init_info: InitInfo) -> None: ...

        def start_weight_update(self) -> None:
            self.loaded: set[str] = set()
            for layer in self.model.modules() if on_cpu else ():
                if isinstance(method := getattr(layer, "quant_method", None), UnquantizedFusedMoEMethod):
                    # On a CPU experts are packed when their kernel is made, and with a kernel there never again.
                    method.moe_kernel = None
            initialize_layerwise_reload(self.model)
            # Now, as parameters are what is loaded: what FP8 makes of them, scales among it, comes from nowhere else.
            self.needed = {name for name, _ in self.model.named_parameters()}

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.receive_weights(self.parse_update_info(update_info))  # the base class then waits for an accelerator

        def receive_weights(self, update_info: UpdateInfo) -> None:
            model: Any = self.model
            try:
                self.loaded |= model.load_weights(iter(update_info.weights))
            except (KeyError, ValueError, AssertionError, RuntimeError) as error:
                names = f"{update_info.weights[0][0]} ... {update_info.weights[-1][0]}"
                raise WeightSyncError(f"vLLM does not take the weights {names}: {error}") from error

        def finish_weight_update(self) -> None:
            head: Any = getattr(self.model, "lm_head", None)
            tied = bool(self.model_config.hf_text_config.tie_word_embeddings)
            if missing := sorted(self.needed - self.loaded - ({"lm_head.weight"} if tied else set())):
                raise WeightSyncError(f"none came for {len(missing)} of vLLM's parameters: {', '.join(missing[:3])}")
            finalize_layerwise_reload(self.model, self.model_config)
            if tied:
                # On a CPU the head works on a packed copy of the embedding, which nothing else would renew.
                head.quant_method.process_weights_after_loading(head)

        def shutdown(self) -> None: ...

    WeightTransferEngineFactory.register_engine(_BACKEND, InProcess)


@contextlib.contextmanager
def _in_vllm(doing: str) -> Iterator[None]:
    """No gradients, and without what makes Megatron-Core run on a CPU: vLLM must not see that. What goes wrong inside
    is the end of the run: the other ranks wait for this one, and only its launcher can tell them."""
    try:
        with cpu.suspended(), torch.no_grad():
            yield
    except (UserError, RunError):
        raise
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise RunError(f"vLLM failed while {doing}: {type(error).__name__}: {reason}") from error


def _model_folder(model: ModelConfig, vocab_size: int, folder: Path) -> str:
    """`folder`, with the model's configuration. Its weights come from the policy: neither in FP8 nor with MTP, though
    the model may be published so."""
    if model.hf_path:
        copy_configuration(model, folder)
    else:
        (folder / "config.json").write_text(json.dumps(_llama_config(model, vocab_size)))
    return str(folder)


def _head_size(model: ModelConfig) -> int:
    if not model.hf_path:
        return model.hidden_size // model.num_attention_heads
    from transformers import AutoConfig

    hf: Any = AutoConfig.from_pretrained(model.hf_path)
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def _llama_config(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """How Hugging Face would describe a model of ours that starts from random weights."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "max_position_embeddings": model.max_sequence_length,
        "rope_theta": model.rotary_base,
        "rms_norm_eps": RMS_NORM_EPSILON,
        "tie_word_embeddings": model.tie_embeddings,
        "vocab_size": vocab_size,
    }


class PolicyWeights:
    """The weights of the policy in these ranks, under Hugging Face's names."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @property
    def version(self) -> int:
        return self.policy.updates

    @property
    def sent_checksums(self) -> Mapping[str, Checksum]:
        return {}

    def weights(self) -> Iterator[Weight]:
        """Every tensor whole on every rank; it may be a parameter's own memory. Collective."""
        from megatron_aspo.policy import hf  # takes seconds to import

        model = self.policy.config.model
        if model.hf_path:
            yield from hf.export_weights(self.policy)
            return
        from transformers import LlamaConfig

        bridge = hf.AutoBridge.from_hf_config(LlamaConfig(**_llama_config(model, self.policy.vocab_size)))
        for name, tensor in bridge.export_hf_weights([self.policy.model.module], show_progress=False):
            yield name, tensor.detach()
