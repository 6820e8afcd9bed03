"""Gated delta nets of vLLM on a CPU, in float32: the kernels of vLLM 0.32 for a CPU take bfloat16 alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_aspo.policy.cpu.gated_delta import chunk_gated_delta_rule, l2norm


def install() -> None:
    """Let layers that vLLM makes from now on call `attend`. Idempotent."""
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    module: Any = gdn_attention
    attend.__annotations__["layer_name"] = module.LayerNameType  # torch checks it when vLLM registers the function
    module.cpu_gdn_attention_core = attend


def attend(mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor, layer_name: Any) -> None:
    """Fill `core_attn_out` [tokens, heads, d_v], and advance the states of all running sequences.

    A layer keeps two states a sequence, which begin at 0: the last inputs of its convolution, and the recurrence's.

    Args:
        mixed_qkv: inputs of the convolution [tokens, d]; sequences lie one behind the other.
        b, a: gates before their activations [tokens, heads].
        layer_name: vLLM's name of the layer.
    """
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.mamba.ops.cpu.gdn_attention import _conv_buffer_view, _ssm_state_view
    from vllm.utils.torch_utils import _resolve_layer_name

    context = get_forward_context()
    layer: Any = context.no_compile_layers[_resolve_layer_name(layer_name)]
    metadata: Any = context.attn_metadata
    if metadata is None:  # a first pass, which measures memory
        return
    metadata = metadata[layer.prefix]
    conv_states, states = _conv_buffer_view(layer), _ssm_state_view(layer)
    convolution = layer.conv1d.weight  # [d, 1, width]
    assert layer.activation in ("silu", "swish"), layer.activation
    rates, log_decays = b.float().sigmoid(), -layer.A_log.exp() * F.softplus(a.float() + layer.dt_bias)
    ends = metadata.non_spec_query_start_loc.tolist()
    slots = metadata.non_spec_state_indices_tensor.tolist()
    for i in range(metadata.num_decodes + metadata.num_prefills):
        tokens, slot = slice(ends[i], ends[i + 1]), slots[i]
        if i >= metadata.num_decodes and not metadata.has_initial_state[i]:
            conv_states[slot], states[slot] = 0, 0
        inputs = torch.cat([conv_states[slot], mixed_qkv[tokens].T], 1)
        conv_states[slot] = inputs[:, -conv_states.shape[2] :]
        convolved = F.silu(F.conv1d(inputs[None], convolution, layer.conv1d.bias, groups=len(convolution)))[0].T
        query, key, value = layer.rearrange_mixed_qkv(convolved)
        repeats = value.shape[2] // query.shape[2]
        query, key = (l2norm(x.float()).repeat_interleave(repeats, 2) for x in (query, key))
        gates = log_decays[tokens][None], rates[tokens][None]
        out, last = chunk_gated_delta_rule(query, key, value, *gates, initial_state=states[slot][None])
        core_attn_out[tokens], states[slot] = out[0], last[0]
