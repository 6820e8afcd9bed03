"""The model configuration for a GPU, and rotary embedding on tensors without memory."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from ranks import VOCAB, run, run_config
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from megatron_aspo.config.model import ModelConfig, ParallelConfig
from megatron_aspo.errors import UserError
from megatron_aspo.ranks.process_group import distributed

pytestmark = pytest.mark.distributed

DENSE = replace(run_config().model, dtype="bfloat16")
EXPERTS = replace(DENSE, num_experts=4, moe_ffn_hidden_size=32)

SETTINGS = ("apply_rope_fusion", "moe_permute_fusion", "moe_grouped_gemm", "use_cpu_initialization")
DISPATCHER = ("moe_token_dispatcher_type", "moe_flex_dispatcher_backend")


def settings(
    model: ModelConfig, latent: bool, on_gpu: bool, parallel: ParallelConfig | None = None, kernels: str = ""
) -> dict[str, Any]:
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.moe import fused_a2a, moe_utils

    from megatron_aspo.policy.architecture import Architecture
    from megatron_aspo.policy.model import transformer_config

    torch.cuda.is_available = lambda: on_gpu
    fused_a2a.HAVE_DEEP_EP, fused_a2a.HAVE_HYBRIDEP = kernels == "deepep", kernels == "hybridep"
    fused: Any = object()  # Megatron only checks that Transformer Engine's functions exist
    rope_utils.fused_apply_rotary_pos_emb = rope_utils.fused_apply_rotary_pos_emb_thd = fused
    for name in vars(moe_utils).copy():
        if name.startswith("fused_"):
            setattr(moe_utils, name, fused)
    architecture = Architecture.from_config(model)
    shape = architecture.transformer | ({"multi_latent_attention": True} if latent else {})
    config = run_config(parallel, model=model)
    try:
        made = transformer_config(config, Architecture(shape, 1e4, tie_embeddings=False))
    except UserError as error:
        return {"error": str(error)}
    return {name: getattr(made, name) for name in (DISPATCHER if parallel else SETTINGS)}


@pytest.mark.parametrize(
    ("model", "latent", "rope", "permute"),
    [(DENSE, False, True, False), (EXPERTS, False, True, True), (EXPERTS, True, False, True)],
    ids=["dense", "experts", "experts, latent attention"],
)
def test_fused_kernels_on_a_gpu(model: ModelConfig, latent: bool, rope: bool, permute: bool) -> None:
    (on_gpu,) = run(1, settings, model, latent, True)
    # From the CPU's generator, which no rank seeds apart, expert-parallel ranks would draw the same experts.
    assert tuple(on_gpu.values()) == (rope, permute, permute, False)
    (on_cpu,) = run(1, settings, model, latent, False)
    assert tuple(on_cpu.values()) == (False, False, False, True)


@pytest.mark.parametrize("backend", ["deepep", "hybridep"])
def test_a_dispatcher_with_kernels_of_its_own(backend: Literal["deepep", "hybridep"]) -> None:
    """Without the GPU, the package, or with a build of it that has the other kernels, one line says so."""
    layout = ParallelConfig(expert=2, moe_dispatcher="flex", moe_flex_backend=backend)
    (found,) = run(1, settings, EXPERTS, False, True, layout, backend)
    assert tuple(found.values()) == ("flex", backend)
    other = "hybridep" if backend == "deepep" else "deepep"
    for on_gpu, kernels in ((False, backend), (True, other)):
        (refused,) = run(1, settings, EXPERTS, False, on_gpu, layout, kernels)
        assert "parallel.moe_dispatcher=flex needs a GPU and the package deep_ep with" in refused["error"]
        assert "\n" not in refused["error"]


def rotate(context_size: int) -> tuple[Any, bool, bool]:
    """(shape and device of our result, whether Megatron's function synchronizes with the device, whether a model
    gets ours)."""
    from megatron.core.models.common.embeddings import rope_utils

    from megatron_aspo.policy.rotary import apply_rotary_thd
    from megatron_aspo.policy.trainer import Policy

    megatrons = rope_utils._apply_rotary_pos_emb_thd
    group: Any = SimpleNamespace(size=lambda: context_size, rank=lambda: 0)
    with FakeTensorMode():
        t = torch.empty(24 // context_size, 3, 8, device="cuda")
        boundaries = torch.empty(4, dtype=torch.int32, device="cuda")
        angles = torch.empty(16, 1, 1, 8, device="cuda")
        ours = apply_rotary_thd(t, boundaries, angles, cp_group=group)
        try:
            megatrons(t, boundaries, angles, cp_group=group)
            waits = False
        except DataDependentOutputException:
            waits = True
    config = run_config()
    with distributed(config):
        Policy(config, VOCAB)
    return (tuple(ours.shape), ours.device.type), waits, rope_utils._apply_rotary_pos_emb_thd is apply_rotary_thd


@pytest.mark.parametrize("context_size", [1, 2])
def test_rotary_embedding_does_not_wait_for_the_device(context_size: int) -> None:
    (((shape, device), megatrons_waits, installed),) = run(1, rotate, context_size)
    assert (shape, device) == ((24 // context_size, 3, 8), "cuda")
    assert megatrons_waits
    assert installed
