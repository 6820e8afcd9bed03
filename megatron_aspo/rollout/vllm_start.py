"""Starting vLLM in the process of a rank, and loading weights. The `vllm*.py` here are all that depends on vLLM's
version."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_aspo.config.model import ModelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.policy.cpu import cuda as cpu
from megatron_aspo.policy.hf.folder import copy_configuration
from megatron_aspo.ranks.gathering import gather_objects
from megatron_aspo.rollout import vllm_delta_net
from megatron_aspo.rollout.weight_sync import Weight, WeightSyncError, llama_config

QUANTIZATION = {
    "none": {},
    # vLLM's FP8 scheme with one scale per tensor has no CPU kernel. Routers, named "gate", count as linear layers.
    "fp8": {"quantization": "fp8_per_channel", "quantization_config": {"ignore": ["*gate"]}},
}
"""vLLM's arguments for each `rollout.quantization`."""

_MEMORY_UTILIZATION = 0.02
"""vLLM refuses to start if less than this fraction of the GPU is free (its default: 0.92), and the policy fills most of
the GPU. The fraction has no other effect, because `kv_cache_memory_bytes` sets the size of the key-value cache."""


def start_vllm(model: ModelConfig, vocab_size: int, config: RolloutConfig, seed: int, routes: bool = False) -> Any:
    """Build a `vllm.LLM` with random weights, which returns its `routes` on request. Collective over all ranks.

    Raises:
        UserError: vLLM refuses the configuration.
    """
    on_cpu = not torch.cuda.is_available()
    prepare_environment(on_cpu)
    from vllm import LLM, EngineArgs

    folder = str(configuration_folder(model, vocab_size))
    arguments = {"model": folder, **engine_arguments(model, config, seed, on_cpu, routes)}
    try:
        if on_cpu:
            made = EngineArgs(**arguments).create_model_config()
            _check_head_size(made)
            if made.use_mla:
                _rotate_in_torch()
            if made.is_hybrid:
                arguments["enable_prefix_caching"] = False  # vLLM caches no states without chunked prefill
                if made.dtype == torch.float32:
                    vllm_delta_net.install()
            _rename_shared_memory()
        llm = LLM(**arguments)
    except ValueError as error:
        raise UserError(f"vLLM refuses this configuration: {error}") from error
    # On collection vLLM would destroy the default process group, which belongs to the trainer.
    core: Any = llm.llm_engine.engine_core
    core._finalizer.detach()
    return llm


def configuration_folder(model: ModelConfig, vocab_size: int) -> Path:
    """A folder with the model's configuration and tokenizer, which has the same name in every process and run: vLLM
    finds its compiled code by the folder's path."""
    from vllm.envs import VLLM_CACHE_ROOT

    parent = Path(VLLM_CACHE_ROOT) / "megatron_aspo"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as made:
        # The policy's weights are in 16 or 32 bits and without MTP layers, even if the published model has FP8 and MTP.
        if model.hf_path:
            copy_configuration(model, Path(made))
        else:
            (Path(made) / "config.json").write_text(json.dumps(llama_config(model, vocab_size)))
        content = [(path.name, path.read_bytes()) for path in sorted(Path(made).iterdir())]
        folder = parent / hashlib.sha256(repr(content).encode()).hexdigest()[:16]
        try:
            os.rename(made, folder)
        except OSError:
            if not folder.is_dir():  # else another rank, or an earlier run, was first
                raise
    return folder


def engine_arguments(
    model: ModelConfig, config: RolloutConfig, seed: int, on_cpu: bool, routes: bool = False
) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM`, except the model's folder."""
    # On a GPU vLLM stores the routes of cached prompts. On a CPU a hook sees only the tokens that are run.
    routed = {"enable_prefix_caching": False} if on_cpu else {"enable_return_routed_experts": True}
    return {
        **(routed if routes else {}),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": model.dtype,
        **QUANTIZATION[config.quantization],
        "max_model_len": model.max_sequence_length,
        "max_num_seqs": config.batch_size,
        "kv_cache_memory_bytes": int(config.kv_cache_gb * (1 << 30)),
        "gpu_memory_utilization": _MEMORY_UTILIZATION,
        "tensor_parallel_size": config.tensor,
        "distributed_executor_backend": "external_launcher",
        # vLLM's kernel opens the buffers of captured graphs by CUDA IPC, which expandable segments do not support:
        # the process would exit with "invalid argument". NCCL replaces it.
        "disable_custom_all_reduce": config.tensor > 1 and _expandable_segments(),
        "enforce_eager": on_cpu,
        # A prompt prefilled in two chunks draws one random number too many; on a CPU vLLM fails there.
        "enable_chunked_prefill": not on_cpu,
        "enable_sleep_mode": not on_cpu and config.sleep_level > 0 and not config.ranks,
        # A step that vLLM starts ahead would be of the old weights and count as one of the new.
        **({"async_scheduling": False} if config.in_flight else {}),
        "logprobs_mode": "processed_logprobs",
        "seed": seed,
        "disable_log_stats": True,
    }


def _expandable_segments() -> bool:
    """Whether torch's CUDA allocator is configured to use expandable segments; the first variable has precedence."""
    configuration = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    return re.search(r"expandable_segments\s*:\s*True", configuration) is not None


def prepare_environment(on_cpu: bool) -> None:
    """Set the environment variables that vLLM reads; must be called before vLLM is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # runs the engine in this process, where the weights are
    # The process group exists already, so the port is not used. On a CPU vLLM's warnings are about absent accelerators.
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    defaults["VLLM_LOGGING_LEVEL"] = "ERROR" if on_cpu else "WARNING"
    if on_cpu:
        # By default vLLM binds its threads to cores that other ranks' trainers use as well.
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # Compiling the sampled tokens' log-probs needs a C++ compiler and up to 15 seconds, without any gain.
        torch.compiler.set_stance("force_eager")
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _check_head_size(model: Any) -> None:
    """Refuse a head size for which vLLM would start and then fail in its first forward pass."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size, supported = model.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if not model.use_mla and size not in supported:
        raise UserError(
            f"vLLM's attention on a CPU has no kernel for heads of {size}, only of {', '.join(map(str, supported))}; "
            "change model.num_attention_heads or model.hidden_size, or set rollout.engine=megatron"
        )


def _rotate_in_torch() -> None:
    """Let vLLM rotate by its function in torch: on a CPU, vLLM 0.32's kernel rotates interleaved queries of several
    heads wrongly (GLM-4.7-Flash; DeepSeek's scaled embeddings have no such kernel)."""
    from vllm.model_executor.layers.rotary_embedding import base

    rotary: Any = base.RotaryEmbedding
    rotary.forward_cpu = rotary.forward_native


def _rename_shared_memory() -> None:
    """Make the name of the tensor-parallel ranks' shared memory unique. Under an external launcher vLLM's own name is
    the same for all jobs on a host, and for what a killed job has left behind."""
    from vllm.distributed.device_communicators import cpu_communicator

    prefix = gather_objects(uuid.uuid4().hex)[0]
    communicator: Any = cpu_communicator._CPUSHMDistributed
    original = communicator.make_group_name
    communicator.make_group_name = staticmethod(lambda group: prefix + original(group).replace("/", ""))


@contextlib.contextmanager
def weight_update(llm: Any) -> Iterator[Callable[[list[Weight]], None]]:
    """Yield a function that loads tensors into vLLM's model, with the steps of vLLM's own weight transfer.

    Raises:
        WeightSyncError: the model has no place for a tensor, or a parameter got none.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model, config = model_of(llm), llm.llm_engine.vllm_config
    with in_vllm("taking weights"), set_current_vllm_config(config):
        for layer in model.modules() if not torch.cuda.is_available() else ():
            if isinstance(method := getattr(layer, "quant_method", None), UnquantizedFusedMoEMethod):
                # On a CPU experts are packed when their kernel is made, and never again while that kernel exists.
                method.moe_kernel = None
        initialize_layerwise_reload(model)
    # Names before FP8 quantization, whose scales and codes are derived from the loaded tensors.
    unset = {name for name, _ in model.named_parameters()}

    def load(bucket: list[Weight]) -> None:
        with in_vllm("taking weights"), set_current_vllm_config(config):
            try:
                unset.difference_update(model.load_weights(iter(bucket)))
            except (KeyError, ValueError, AssertionError, RuntimeError) as error:
                names = f"{bucket[0][0]} ... {bucket[-1][0]}"
                raise WeightSyncError(f"vLLM refuses the weights {names}: {error}") from error

    yield load
    tied = bool(config.model_config.hf_text_config.tie_word_embeddings)
    if missing := sorted(unset - ({"lm_head.weight"} if tied else set())):
        raise WeightSyncError(f"{len(missing)} of vLLM's parameters got no weights: {', '.join(missing[:3])}")
    with in_vllm("taking weights"), set_current_vllm_config(config):
        finalize_layerwise_reload(model, config.model_config)
        if tied:
            # On a CPU the head works on a packed copy of the embedding, which nothing else would renew.
            model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def model_of(llm: Any) -> Any:
    """vLLM's model, which is in this process."""
    return llm.llm_engine.model_executor.driver_worker.get_model()


_streams: list[Any] = []
"""The CUDA stream that vLLM has made current."""


@contextlib.contextmanager
def _own_stream() -> Iterator[None]:
    """Run vLLM on its stream, and leave the policy on the stream of its backward passes. Each waits for the other."""
    if not torch.cuda.is_available():
        yield
        return
    policys = torch.cuda.current_stream()
    stream = _streams[-1] if _streams else policys
    stream.wait_stream(policys)
    with torch.cuda.stream(stream):
        yield
        _streams[:] = [torch.cuda.current_stream()]
        policys.wait_stream(_streams[-1])


@contextlib.contextmanager
def in_vllm(activity: str) -> Iterator[None]:
    """Run vLLM without gradients and without the patches that let Megatron-Core run on a CPU.

    An unexpected exception becomes a RunError: other ranks wait for this one, so the run must end.
    """
    try:
        with cpu.suspended(), torch.no_grad(), _own_stream():
            yield
    except (UserError, RunError):
        raise
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise RunError(f"vLLM failed while {activity}: {type(error).__name__}: {reason}") from error
