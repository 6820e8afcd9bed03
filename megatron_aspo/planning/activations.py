"""Bytes that the backward pass keeps, per layer and micro-batch. Plain arithmetic; imports no torch.

The method is that of Korthikanti et al. 2022 (Reducing Activation Recomputation in Large Transformer Models, section
4): go through a layer and add up what each operation saves. Here the layer is Megatron-Core 0.19's, with RMSNorm,
grouped-query attention by flash attention, SwiGLU and packed streams. `LayerActivations` gives every item its name, so
that what the layers on a CPU keep besides (`on_cpu`) is told apart; the tests measure those.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_aspo.config import ParallelConfig, TrainConfig
from megatron_aspo.planning.architectures import Shape

FLOAT, HALF = 4, 2


@dataclass(frozen=True)
class LayerActivations:
    """Saved bytes of one layer for one micro-batch on one rank.

    Attributes:
        items: name -> bytes; what each is saved for is where it is computed.
        layer_input: of the residual stream, all that is kept of a layer that is recomputed.
        working: the most that the backward pass needs besides for a moment, an estimate: the gathered input of a
            linear layer and the gradients of its input and output.
    """

    items: dict[str, int]
    layer_input: int
    working: int

    @property
    def total(self) -> int:
        return sum(self.items.values())

    def without(self, modules: tuple[str, ...]) -> int:
        """What is left when `modules` (of `train.recompute_modules`) are recomputed."""
        dropped = {name for module in modules for name in _INSIDE.get(module, ())}
        return sum(size for name, size in self.items.items() if name not in dropped)

    def inside(self, modules: tuple[str, ...]) -> int:
        """What comes back while one layer is recomputed."""
        return self.total - self.without(modules)


# What a recomputed module does not keep. Its input stays: "mlp" and "moe" keep the output of the norm before them.
_INSIDE = {
    "core_attn": ("attention statistics",),  # flash attention keeps its inputs and output either way
    "layernorm": ("norm outputs",),
    "mlp": ("gate and up", "product", "cpu: mlp"),
    "moe": (
        "router",
        "dispatched tokens",
        "expert gate and up",
        "expert product",
        "shared gate and up",
        "shared product",
        "cpu: experts",
    ),
    "moe_act": ("expert product",),
    "shared_experts": ("shared gate and up", "shared product"),
    "mla_up_proj": ("queries, keys, values",),
}


def layer_activations(
    shape: Shape, layer: int, parallel: ParallelConfig, tokens: int, *, element: int = HALF, on_cpu: bool = False
) -> LayerActivations:
    """Of a layer, for a stream of which this rank's context-parallel part has `tokens` tokens.

    Args:
        element: bytes of a number of the model.
        on_cpu: the layers that a CPU takes, instead of Transformer Engine's.
    """
    tp = parallel.tensor
    # Under sequence parallelism what lies between the matrices is spread over the tensor-parallel ranks.
    spread = tokens // tp if parallel.sequence_parallel else tokens
    h, e = shape.hidden_size, element
    items: dict[str, int] = {}

    items["norm inputs"] = 2 * spread * h * e
    items["norm outputs"] = 2 * spread * h * e  # inputs of the matrices behind
    items["norm statistics"] = 2 * spread * FLOAT
    rotary = shape.latent.rope_dim if shape.latent else shape.head_dim
    items["rotary tables"] = 4 * tokens * rotary * e  # sines and cosines, of queries and of keys
    heads = shape.num_heads // tp
    items["attention statistics"] = tokens * heads * FLOAT
    if shape.latent is None:
        q, kv = shape.query_size // tp, max(shape.kv_size // tp, shape.head_dim)
        # The values are a part of the projection's output, and keep all of it alive; rotating makes new tensors.
        items["queries, keys, values"] = tokens * ((q + 2 * kv) + (q + kv)) * e
        items["head norms"] = (tokens * (q + kv) * e + tokens * (heads + kv // shape.head_dim) * FLOAT) * shape.qk_norm
        out = q
    else:
        latent = shape.latent
        q_dim = latent.nope_dim + latent.rope_dim
        items["latents"] = tokens * (2 * latent.q_rank + 2 * latent.kv_rank + latent.rope_dim) * e
        # What the two projections make, and the queries, keys and (padded to their size) values put together from it.
        items["queries, keys, values"] = tokens * heads * (q_dim + latent.nope_dim + latent.value_dim + 3 * q_dim) * e
        out = heads * latent.value_dim
    items["attention output"] = tokens * out * e

    if shape.has_experts(layer):
        etp, f = parallel.expert_tensor_size, shape.expert_size
        items["router"] = spread * (shape.num_experts * (3 * FLOAT + 1) + shape.top_k * (FLOAT + 2 * 8))
        rows = spread * shape.top_k * etp  # if the router spreads tokens evenly over expert-parallel ranks
        items["dispatched tokens"] = rows * (h * e + FLOAT)
        items["expert gate and up"] = rows * 2 * f // etp * e
        items["expert product"] = rows * f // etp * e
        items["shared gate and up"] = tokens * 2 * shape.shared_size // tp * e
        items["shared product"] = tokens * shape.shared_size // tp * e
        widest = rows * 2 * f // etp
    else:
        f = shape.ffn_size // tp
        items["gate and up"] = tokens * 2 * f * e
        items["product"] = tokens * f * e
        widest = tokens * 2 * f
    if on_cpu:
        _as_on_cpu(items, shape, layer, parallel, tokens, spread, e)
    gathered = tokens * h * e if parallel.sequence_parallel else 0
    working = 2 * gathered + 2 * widest * e
    return LayerActivations({name: size for name, size in items.items() if size}, spread * h * e, working)


def _as_on_cpu(
    items: dict[str, int], shape: Shape, layer: int, parallel: ParallelConfig, tokens: int, spread: int, e: int
) -> None:
    """The differences of Megatron's local layers with torch's norm and attention."""
    h, heads = shape.hidden_size, shape.num_heads // parallel.tensor
    # The norm keeps its input and what it made of it, both in float32.
    items["norm inputs"] = 2 * spread * h * 2 * FLOAT
    if shape.latent is None:
        q, kv = shape.query_size // parallel.tensor, shape.kv_size // parallel.tensor
        # Segments are unfolded into copies, and so is the output.
        items["queries, keys, values"] = tokens * (q + 2 * kv) * e
        items["cpu: attention"] = tokens * q * e + 3 * tokens * 8
        if shape.qk_norm:
            items["head norms"] = tokens * (q + kv) * 2 * FLOAT + tokens * (heads + kv // shape.head_dim) * FLOAT
    if shape.has_experts(layer):
        rows = spread * shape.top_k * parallel.expert_tensor_size
        f = shape.expert_size // parallel.expert_tensor_size
        items["cpu: experts"] = rows * (3 * f * e + 3 * 8)
    else:
        items["cpu: mlp"] = tokens * 2 * shape.ffn_size // parallel.tensor * e  # unfused SwiGLU: two factors


def stage_activations(layers: list[LayerActivations], train: TrainConfig, in_flight: int) -> tuple[int, int]:
    """(bytes kept, bytes of the layer that is being recomputed or differentiated) of a pipeline stage that holds
    `in_flight` micro-batches at once."""
    working = max(layer.working for layer in layers)
    if train.recompute == "none":
        return in_flight * sum(layer.total for layer in layers), working
    if train.recompute == "selective":
        kept = sum(layer.without(train.recompute_modules) for layer in layers)
        return in_flight * kept, working + max(layer.inside(train.recompute_modules) for layer in layers)
    if train.recompute_method == "uniform":
        groups = [layers[i : i + train.recompute_layers] for i in range(0, len(layers), train.recompute_layers)]
        kept = sum(group[0].layer_input for group in groups)
        return in_flight * kept, working + max(sum(layer.total for layer in group) for group in groups)
    dropped, whole = layers[: train.recompute_layers], layers[train.recompute_layers :]
    kept = sum(layer.layer_input for layer in dropped) + sum(layer.total for layer in whole)
    return in_flight * kept, working + max(layer.total for layer in dropped)
