"""How many parameters a model has, a rank holds, and a token passes through. Plain arithmetic; imports no torch.

The parts are those of Megatron-Core's GPTModel; `megatron-aspo plan --build` compares them with a built one.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_aspo.config import ParallelConfig
from megatron_aspo.config_checks import stage_layers
from megatron_aspo.planning.architectures import Shape


@dataclass(frozen=True)
class Count:
    """Parameters of a rank: of its experts, and all others. They are reduced over different groups of ranks."""

    dense: int = 0
    expert: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.dense + other.dense, self.expert + other.expert)

    @property
    def total(self) -> int:
        return self.dense + self.expert


def layer_parameters(shape: Shape, layer: int, parallel: ParallelConfig, te_layers: bool = True) -> Count:
    """Of one layer, on one rank; `te_layers`: it is Transformer Engine's, not Megatron-Core's own."""
    dense = _attention_parameters(shape, parallel.tensor, te_layers) + 2 * shape.hidden_size  # two norms
    if not shape.has_experts(layer):
        return Count(dense + 3 * shape.hidden_size * shape.ffn_size // parallel.tensor)
    dense += shape.hidden_size * shape.num_experts  # the router, on every rank
    dense += 3 * shape.hidden_size * shape.shared_size // parallel.tensor
    one_expert = 3 * shape.hidden_size * shape.expert_size // parallel.expert_tensor_size
    return Count(dense, shape.num_experts // parallel.expert * one_expert)


def _attention_parameters(shape: Shape, tensor: int, te_layers: bool) -> int:
    h = shape.hidden_size
    if shape.latent is None:
        qkv = (shape.query_size + 2 * shape.kv_size) * (h + (1 if shape.qkv_bias else 0)) // tensor
        norms = 2 * shape.head_dim if shape.qk_norm else 0
        return qkv + norms + shape.query_size * h // tensor
    latent = shape.latent
    down = h * (latent.q_rank + latent.kv_rank + latent.rope_dim)
    if not te_layers:  # Transformer Engine's are whole on every rank
        down //= tensor
    q_up = latent.q_rank * shape.num_heads * (latent.nope_dim + latent.rope_dim)
    kv_up = latent.kv_rank * shape.num_heads * (latent.nope_dim + latent.value_dim)
    out = shape.num_heads * latent.value_dim * h
    return down + latent.q_rank + latent.kv_rank + (q_up + kv_up + out) // tensor


def vocabulary_rows(shape: Shape, tensor: int) -> int:
    """Rows of the embedding on a rank: the vocabulary is padded to a multiple of the tensor-parallel size."""
    return -(-shape.vocab_size // tensor)


def stage_parameters(shape: Shape, parallel: ParallelConfig, te_layers: bool = True) -> list[Count]:
    """Of a rank of each pipeline stage; `te_layers` as in `layer_parameters`."""
    counts: list[Count] = []
    first = 0
    table = vocabulary_rows(shape, parallel.tensor) * shape.hidden_size
    for stage, layers in enumerate(stage_layers(shape.num_layers, parallel)):
        held = (layer_parameters(shape, i, parallel, te_layers) for i in range(first, first + layers))
        count = sum(held, Count())
        first += layers
        last = stage == parallel.pipeline - 1
        if stage == 0:
            count += Count(table)
        if last:
            # A tied head is the embedding itself where both are on one rank, else a copy that is kept equal.
            count += Count(shape.hidden_size + (0 if shape.tied and stage == 0 else table))
        counts.append(count)
    return counts


def total_parameters(shape: Shape) -> int:
    """Of the whole model, as model cards count them."""
    return stage_parameters(shape, ParallelConfig())[0].total


def active_parameters(shape: Shape) -> int:
    """That a token is multiplied with: without the embedding's table, with its `top_k` experts."""
    total = 0
    for i in range(shape.num_layers):
        count = layer_parameters(shape, i, ParallelConfig())
        total += count.dense + (count.expert // shape.num_experts * shape.top_k if shape.num_experts else 0)
    return total + shape.vocab_size * shape.hidden_size


def engine_parameters(shape: Shape, tensor: int) -> int:
    """On a rank of a vLLM replica of `tensor` ranks; keys and values are repeated where there are fewer heads."""
    parallel = ParallelConfig(tensor=tensor)
    layers = sum(layer_parameters(shape, i, parallel).total for i in range(shape.num_layers))
    if shape.latent is None and tensor > shape.num_kv_heads:
        repeated = 2 * shape.head_dim * shape.hidden_size - 2 * shape.kv_size * shape.hidden_size // tensor
        layers += shape.num_layers * repeated
    tables = 1 if shape.tied else 2
    return layers + tables * vocabulary_rows(shape, tensor) * shape.hidden_size + shape.hidden_size


def kv_bytes_per_token(shape: Shape, tensor: int, element: int = 2) -> int:
    """Of the rollout engine's cache, on a rank of a replica; MLA's latents are whole on every rank."""
    if shape.latent is not None:
        return shape.num_layers * (shape.latent.kv_rank + shape.latent.rope_dim) * element
    heads = max(1, shape.num_kv_heads // tensor)
    return shape.num_layers * 2 * heads * shape.head_dim * element
