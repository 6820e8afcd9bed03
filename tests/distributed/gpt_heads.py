"""Gradients of a GPTModel's loss by the fused head and by its logits, on any Megatron-Core from 0.14 to 0.19.

Each rank is a process with RANK and WORLD_SIZE in its environment: `python gpt_heads.py FOLDER` writes its results to
FOLDER/RANK.json. All ranks are tensor-parallel.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.cpp_extension


def no_compiler(*_: Any, **__: Any) -> Any:
    raise ImportError("no GPU")


# Megatron-Core 0.15 compiles CUDA code at import where nvcc is installed, and fails without a GPU.
torch.utils.cpp_extension.load_inline = no_compiler

import megatron.core  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_aspo.loss import (  # noqa: E402
    PolicyLossConfig,
    megatron_forward,
    megatron_logprobs_head,
    megatron_loss_func,
    megatron_loss_head,
    megatron_loss_tuple,
)

VOCAB, BATCH, SEQUENCE, MICRO_BATCHES = 96, 3, 20, 2


def on_cpu() -> None:
    """The policy's stand-in for CUDA, from its file: the package around it needs the newest Megatron-Core."""
    path = Path(__file__).parents[2] / "megatron_aspo/policy/cpu/cuda.py"
    found: Any = importlib.util.spec_from_file_location("cpu_shim", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    module.enable()


def gpt_model(tied: bool, dtype: torch.dtype) -> tuple[GPTModel, Any]:
    """A model and its call: bare in float32, in Float16Module otherwise."""
    half = dtype != torch.float32
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        tensor_model_parallel_size=dist.get_world_size(),
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=half,
        params_dtype=dtype,
        calculate_per_token_loss=True,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        finalize_model_grads_func=finalize_model_grads,
    )
    torch.manual_seed(0)
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        VOCAB,
        SEQUENCE,
        parallel_output=True,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=tied,
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, Float16Module(config, model) if half else model


def random_batch(seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The model's arguments, and the loss's without old log-probs: [BATCH, SEQUENCE] each."""
    draw = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(VOCAB, (2, BATCH, SEQUENCE), generator=draw)
    causal = torch.ones(1, 1, SEQUENCE, SEQUENCE).triu(1).bool()
    inputs = tokens, torch.arange(SEQUENCE).expand(BATCH, SEQUENCE), causal
    advantages = torch.randn(BATCH, 1, generator=draw).expand(BATCH, SEQUENCE).contiguous()
    mask = torch.rand(BATCH, SEQUENCE, generator=draw) > 0.3
    return inputs, {"targets": targets, "advantages": advantages, "loss_mask": mask}


def step(fused: bool, batches: Any, model: Any) -> tuple[Any, Any]:
    """A forward step for Megatron's schedules."""
    inputs, tokens = next(batches)
    context = tokens | {"config": PolicyLossConfig(objective="aspo")}
    if fused:
        return megatron_forward(model, *inputs, head=megatron_loss_head, context=context), megatron_loss_tuple
    tp_group = parallel_state.get_tensor_model_parallel_group()
    return model(*inputs), partial(megatron_loss_func, tp_group=tp_group, **context)


def gradients(model: GPTModel, called: Any, fused: bool, batches: list[Any]) -> dict[str, torch.Tensor]:
    """By one backward pass without Megatron's schedule or its gradient buffer."""
    model.zero_grad()
    output, loss_func = step(fused, iter(batches), called)
    loss_func(output)[0].backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def scheduled_gradients(tied: bool, dtype: torch.dtype, fused: bool, batches: list[Any]) -> dict[str, torch.Tensor]:
    """main_grad, after Megatron's schedule has run all micro-batches."""
    model, called = gpt_model(tied, dtype)
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), called)
    ddp.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=partial(step, fused),
        data_iterator=iter(batches),
        model=[ddp],
        num_microbatches=len(batches),
        seq_length=SEQUENCE,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    parameters: Any = model.named_parameters()  # the buffer's attribute is in no type
    return {name: parameter.main_grad.clone() for name, parameter in parameters}


def difference(these: dict[str, torch.Tensor], those: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a parameter's gradients."""
    assert these.keys() == those.keys()
    norms = [float(those[name].norm()) for name in those]
    assert min(norms) > 1e-3, "a parameter without gradient shows nothing"
    return max(float((these[name] - those[name]).norm()) / norm for name, norm in zip(those, norms, strict=True))


def compare(tied: bool, dtype: torch.dtype) -> dict[str, Any]:
    model, called = gpt_model(tied, dtype)
    names = set(model.state_dict())
    batches: list[Any] = []
    errors = []
    for i in range(MICRO_BATCHES):
        inputs, tokens = random_batch(i)
        context = {"targets": tokens["targets"], "loss_mask": tokens["loss_mask"]}
        with torch.no_grad():
            logprobs, _ = megatron_forward(called, *inputs, head=megatron_logprobs_head, context=context)
            logits = called(*inputs, runtime_gather_output=True).float()
        expected = logits.log_softmax(-1).gather(-1, tokens["targets"][..., None])[..., 0]
        errors.append(float(((logprobs - expected) * tokens["loss_mask"]).abs().max()))
        noise = 0.3 * torch.randn(BATCH, SEQUENCE, generator=torch.Generator().manual_seed(9 + i))
        batches.append((inputs, tokens | {"old_logprobs": logprobs + noise}))
    hooks: list[None] = []
    hook = model.output_layer.register_forward_pre_hook(lambda *_: hooks.append(None))
    fused = gradients(model, called, True, batches)
    hook.remove()
    scheduled = (scheduled_gradients(tied, dtype, fused, batches) for fused in (True, False))
    return {
        "tied": tied,
        "dtype": str(dtype).removeprefix("torch."),
        "logprobs": max(errors),
        "gradients": difference(fused, gradients(model, called, False, batches)),
        "hooks": len(hooks),
        "state_dict_is_unchanged": set(model.state_dict()) == names and "forward" not in vars(model.output_layer),
        "main_grad": difference(*scheduled),
    }


def main(folder: Path) -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    on_cpu()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    model_parallel_cuda_manual_seed(1)
    cases = [(tied, dtype) for tied in (False, True) for dtype in (torch.float32, torch.bfloat16)]
    results = {"version": megatron.core.__version__, "cases": [compare(*case) for case in cases]}
    (folder / f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
