"""vLLM's own validation of the engine's arguments, for GPUs as well, without starting an engine."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_aspo.config.model import ModelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.rollout import vllm_start
from megatron_aspo.rollout.vllm_start import QUANTIZATION, configuration_folder, engine_arguments
from megatron_aspo.rollout.weight_sync import llama_config

pytestmark = pytest.mark.engines

GIB = 1 << 30
MODEL = ModelConfig(hidden_size=128, ffn_hidden_size=192, max_sequence_length=64)
ROLLOUT = RolloutConfig(engine="vllm", batch_size=64, kv_cache_gb=20)


def test_vllm_starts_beside_a_policy_that_fills_most_of_the_gpu(tmp_path: Path) -> None:
    from vllm import EngineArgs
    from vllm.config import CacheConfig
    from vllm.utils.mem_utils import MemorySnapshot
    from vllm.v1.worker.utils import request_memory

    given = engine_arguments(MODEL, ROLLOUT, 1, on_cpu=False)
    (tmp_path / "config.json").write_text(json.dumps(llama_config(MODEL, 128)))
    arguments = EngineArgs(model=str(tmp_path), **given)  # raises on unknown names
    cache = CacheConfig(
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        kv_cache_memory_bytes=arguments.kv_cache_memory_bytes,
    )
    snapshot = MemorySnapshot(auto_measure=False, device=torch.device("cpu"))
    snapshot.total_memory, snapshot.free_memory = 80 * GIB, 25 * GIB
    request_memory(snapshot, cache)  # a worker makes this check first on a GPU
    assert cache.kv_cache_memory_bytes == 20 * GIB


def test_routes_are_returned_by_vllm_or_seen_by_a_hook() -> None:
    """vLLM refuses its own option without prefix caching; a hook sees no cached prompt."""
    from vllm import EngineArgs

    on_gpu, on_cpu = (EngineArgs(**engine_arguments(MODEL, ROLLOUT, 1, device, True)) for device in (False, True))
    assert on_gpu.aux_output_config.enable_return_routed_experts
    assert on_gpu.enable_prefix_caching is not False
    assert not on_cpu.aux_output_config.enable_return_routed_experts
    assert on_cpu.enable_prefix_caching is False
    assert on_cpu.enable_chunked_prefill is False


@pytest.mark.parametrize(("on_cpu", "level"), [(True, "ERROR"), (False, "WARNING")])
def test_warnings_of_vllm_are_printed_on_a_gpu(monkeypatch: pytest.MonkeyPatch, on_cpu: bool, level: str) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: None)
    vllm_start.prepare_environment(on_cpu)
    assert environment["VLLM_LOGGING_LEVEL"] == level


EXPANDABLE = "max_split_size_mb:512, expandable_segments: True"


@pytest.mark.parametrize(
    ("first", "second", "tensor", "disabled"),
    [
        ("", "", 4, False),
        ("", EXPANDABLE, 2, True),
        (EXPANDABLE, "", 8, True),
        ("", EXPANDABLE, 1, False),
        ("", "expandable_segments:False", 4, False),
        ("max_split_size_mb:512", EXPANDABLE, 4, False),  # torch reads the second only if the first is not set
    ],
)
def test_no_custom_all_reduce_over_expandable_segments(
    first: str, second: str, tensor: int, disabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", first)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", second)
    given: dict[str, Any] = engine_arguments(MODEL, replace(ROLLOUT, tensor=tensor), 1, on_cpu=False)
    assert given["disable_custom_all_reduce"] is disabled


def test_fp8_leaves_routers_as_they_are() -> None:
    """Layer names follow Qwen's mixtures of experts. FP8 experts cannot run here: vLLM has no such kernel for CPUs."""
    from vllm.config.quantization import resolve_quantization_config
    from vllm.model_executor.layers.linear import ReplicatedLinear
    from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

    settings = QUANTIZATION["fp8"]
    args = resolve_quantization_config(settings["quantization"], settings["quantization_config"])
    assert args is not None
    config = OnlineQuantizationConfig(args)
    names = ("mlp.gate", "mlp.shared_expert_gate", "mlp.gate_up_proj", "self_attn.o_proj")
    result = [config.resolve_quant_method_cls(ReplicatedLinear, f"model.layers.0.{name}") is not None for name in names]
    assert result == [False, False, True, True]


def test_the_compiled_code_of_the_last_start_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's caches are keyed by its configuration, and that by the path of the model's folder."""
    from vllm import EngineArgs

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    given = engine_arguments(MODEL, ROLLOUT, 1, on_cpu=True)
    folders = [configuration_folder(model, 128) for model in (MODEL, MODEL, replace(MODEL, num_layers=3))]
    models = [EngineArgs(model=str(folder), **given).create_model_config() for folder in folders]
    first, second, other = (model.compute_hash() for model in models)
    assert first == second != other
    assert sorted((tmp_path / "megatron_aspo").iterdir()) == sorted({*folders})  # nothing is left behind


class Streams:
    """torch.cuda with streams that have names; vLLM makes one, and makes it current."""

    def __init__(self) -> None:
        self.current, self.waits = "policy", list[str]()

    def make(self, name: str) -> Any:
        return SimpleNamespace(name=name, wait_stream=lambda other: self.waits.append(f"{name} for {other.name}"))

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before


def test_the_policy_stays_on_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward passes began on the default stream; on another one autograd would wait for it at every parameter."""
    streams = Streams()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams.make(streams.current))
    monkeypatch.setattr(torch.cuda, "stream", streams.stream)
    monkeypatch.setattr(vllm_start, "_streams", [])
    within: list[str] = []
    for _ in range(2):
        with vllm_start.in_vllm("sampling"):
            within.append(streams.current)
            streams.current = "vLLM"
        assert streams.current == "policy"
    assert within == ["policy", "vLLM"]
    assert streams.waits[1:] == ["policy for vLLM", "vLLM for policy", "policy for vLLM"]
