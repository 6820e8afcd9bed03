"""Settings of the model and of its parallel layout."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from megatron_aspo.config.fields import SETTINGS, Text
from megatron_aspo.config.rules import require

_SET_WITH_HF_PATH = ("hf_path", "dtype", "max_sequence_length", "moe_aux_loss_coef", "moe_z_loss_coef")

RMS_NORM_EPSILON = 1e-5
"""Epsilon of models that start from random weights."""


@dataclass(frozen=True, config=SETTINGS)
class ModelConfig:
    """A decoder of the Llama architecture (RMSNorm, rotary embeddings, SwiGLU, grouped-query attention), dense or
    with a mixture of experts in every layer: Hugging Face weights, or random weights of the shape given here."""

    hf_path: Text = ""
    """Hub id, or a folder in Hugging Face's format, of a model of `docs/engine.md`, which has shape and tokenizer; only
    `dtype`, `max_sequence_length` and the coefficients of the router's losses are settings. Block-scaled FP8 weights
    are converted to `dtype`. Multi-token prediction is not trained. Empty: random weights."""
    num_layers: PositiveInt = 2
    """Transformer layers."""
    hidden_size: PositiveInt = 64
    """Width of the residual stream."""
    ffn_hidden_size: PositiveInt = 192
    """Width of the feed-forward layers."""
    num_attention_heads: PositiveInt = 4
    """Query heads."""
    num_query_groups: PositiveInt = 2
    """Key and value heads. Attention is not grouped if there are as many as `num_attention_heads`."""
    max_sequence_length: PositiveInt = 128
    """Most tokens of prompt and response together."""
    rotary_base: PositiveFloat = 10000.0
    """Base of the rotary embeddings' frequencies."""
    tie_embeddings: bool = False
    """Share one weight between embedding and output layer."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations. Gradients and optimizer states are float32."""
    num_experts: NonNegativeInt = 0
    """Experts of a layer. 0 is a dense model, which ignores the `moe_` settings."""
    moe_top_k: PositiveInt = 2
    """Experts that each token is sent to."""
    moe_ffn_hidden_size: PositiveInt | None = None
    """Feed-forward width of one expert; null takes `ffn_hidden_size`."""
    moe_aux_loss_coef: NonNegativeFloat = 1e-3
    """Coefficient of the router's load-balancing loss, a mean over all tokens of an update, padding included."""
    moe_z_loss_coef: NonNegativeFloat = 0.0
    """Coefficient of the router's z-loss, averaged over the same tokens."""

    def __post_init__(self) -> None:
        for f in fields(self) if self.hf_path else ():
            value, is_free = getattr(self, f.name), f.name in _SET_WITH_HF_PATH
            require(is_free or value == f.default, f"{f.name}={value} conflicts with model.hf_path; remove one of them")
        width, heads, groups, experts = (
            f"{name}={getattr(self, name)}"
            for name in ("hidden_size", "num_attention_heads", "num_query_groups", "num_experts")
        )
        require(self.hidden_size % self.num_attention_heads == 0, f"{width} is not a multiple of {heads}")
        require(self.num_attention_heads % self.num_query_groups == 0, f"{heads} is not a multiple of {groups}")
        head = self.hidden_size // self.num_attention_heads
        require(head % 2 == 0, f"hidden_size / num_attention_heads = {head} must be even for rotary embeddings")
        top_k = self.moe_top_k
        require(not self.num_experts or top_k <= self.num_experts, f"moe_top_k={top_k} must not exceed {experts}")

    @property
    def expert_hidden_size(self) -> int:
        """Feed-forward width of one expert."""
        return self.ffn_hidden_size if self.moe_ffn_hidden_size is None else self.moe_ffn_hidden_size


@dataclass(frozen=True, config=SETTINGS)
class ParallelConfig:
    """How one replica of the model is spread over ranks. The remaining factor of the world size is data parallelism."""

    tensor: PositiveInt = 1
    """Ranks that share every weight matrix."""
    pipeline: PositiveInt = 1
    """Pipeline stages: ranks that hold a part of the layers each."""
    context: PositiveInt = 1
    """Ranks that hold a part of every packed stream each (Megatron's context parallelism)."""
    expert: PositiveInt = 1
    """Ranks that hold a part of the experts each. They are data-, context- or (with `expert_tensor`) tensor-parallel
    ranks, so expert parallelism needs no ranks of its own."""
    expert_tensor: PositiveInt | None = None
    """Ranks that share the matrices of an expert; null takes `tensor`. With 1, every rank of a tensor-parallel group
    holds whole experts, and `expert` may be larger."""
    sequence_parallel: bool = False
    """Between the weight matrices each tensor-parallel rank keeps only its share of the tokens."""
    first_stage_layers: PositiveInt | None = None
    """Layers of the first pipeline stage, which also has the embedding; null gives it as many as the others."""
    last_stage_layers: PositiveInt | None = None
    """Layers of the last pipeline stage, which also has the loss; null gives it as many as the others."""
    virtual_pipeline: PositiveInt = 1
    """Chunks of consecutive layers of each pipeline stage (virtual stages). With n chunks the pipeline's bubble is
    1 / n as long, and stages exchange n times as many messages. A stage's layers are a multiple of it."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks during the backward pass of the last micro-batch."""
    overlap_param_gather: bool = False
    """Gather updated weights over data-parallel ranks during the next forward pass, layer by layer, instead of after
    the update. Needs `overlap_grad_reduce`. It pays where a step takes several updates."""
    moe_dispatcher: Literal["alltoall", "flex"] = "alltoall"
    """Exchange of tokens between expert-parallel ranks: NCCL's all-to-all, or the kernels of `moe_flex_backend`."""
    moe_flex_backend: Literal["deepep", "hybridep"] = "deepep"
    """Kernels of `moe_dispatcher=flex`, both of the package deep_ep; "hybridep" is on its branch hybrid-ep."""

    def __post_init__(self) -> None:
        size = self.expert_tensor_size
        require(size <= self.tensor, f"expert_tensor={size} exceeds tensor={self.tensor}")
        for name in ("first_stage_layers", "last_stage_layers"):
            layers = getattr(self, name)
            require(layers is None or self.pipeline > 1, f"{name}={layers} needs pipeline > 1; remove it")
        require(not self.sequence_parallel or self.tensor > 1, "sequence_parallel=true needs tensor > 1; remove it")
        chunks, overlap = self.virtual_pipeline, self.overlap_param_gather
        require(chunks == 1 or self.pipeline > 1, f"virtual_pipeline={chunks} needs pipeline > 1; remove it")
        needed = "overlap_param_gather=true needs overlap_grad_reduce=true; set both"
        require(not overlap or self.overlap_grad_reduce, needed)
        shares = self.expert * size
        require(self.moe_dispatcher != "flex" or shares > 1, "moe_dispatcher=flex needs expert > 1; set alltoall")

    @property
    def model_parallel_size(self) -> int:
        """Ranks of one replica. The number of training ranks is a multiple of it."""
        return self.pipeline * math.lcm(self.tensor * self.context, self.expert_tensor_size * self.expert)

    @property
    def rounds(self) -> int:
        """Divisor of a rank's micro-batches. Virtual stages take as many in turn as there are pipeline stages."""
        return self.pipeline if self.virtual_pipeline > 1 else 1

    @property
    def equal_streams(self) -> bool:
        """Whether the streams of an update have one length, for messages between stages or HybridEP's kernels."""
        return self.pipeline > 1 or (self.moe_dispatcher, self.moe_flex_backend) == ("flex", "hybridep")

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that share the matrices of an expert."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def stream_multiple(self) -> int:
        """Divisor of a packed stream's length that the layout requires. Context-parallel parts are pairs of chunks, and
        sequence parallelism spreads every part evenly over the tensor-parallel ranks."""
        share = self.tensor if self.sequence_parallel else 1
        return math.lcm(2 * self.context, share * self.context) if self.context > 1 else share
