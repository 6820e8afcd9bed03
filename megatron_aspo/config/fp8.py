"""FP8: its settings, and what it requires of shapes, layouts and GPUs. Imports neither torch nor Megatron.

The limits are those of Transformer Engine 2.20 and Megatron-Core 0.19. Megatron-Core accepts any recipe or format, and
without Transformer Engine it computes in bf16 without a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from megatron_aspo.config.fields import SETTINGS
from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.config.rules import require
from megatron_aspo.errors import UserError

Fp8Recipe = Literal["delayed", "current", "blockwise", "mxfp8"]

Version = tuple[int, int]

_MULTIPLE = {"delayed": 16, "current": 16, "blockwise": 128, "mxfp8": 32}
"""Divisor of every dimension of a matrix product. Blocks of blockwise are 128 wide, but Megatron's own table has 16."""

_DEVICE: dict[Fp8Recipe, tuple[Version, Version, Version]] = {
    "delayed": ((8, 9), (99, 0), (0, 0)),
    "current": ((8, 9), (99, 0), (0, 0)),
    "blockwise": ((9, 0), (99, 0), (12, 9)),
    "mxfp8": ((10, 0), (12, 0), (0, 0)),
}
"""Lowest compute capability, the first that is too high, and the lowest version of CUDA."""


@dataclass(frozen=True, config=SETTINGS)
class Fp8Config:
    """Matrix products of the transformer layers in 8-bit floating point. Embeddings, norms, attention, router, output
    layer and log-probs are unaffected."""

    recipe: Fp8Recipe | None = None
    """Scales: "delayed" per tensor, from earlier passes; "current" per tensor, from its own values; "blockwise" per 128
    values (128 x 128 of a weight) and "mxfp8" per 32, powers of two. null turns FP8 off."""
    format: Literal["hybrid", "e4m3"] = "hybrid"
    """"hybrid": gradients in E5M2, everything else in E4M3. "e4m3": everything in E4M3."""
    bf16_layers_at_start: NonNegativeInt = 0
    """First layers that stay in the model's type. Not with "delayed"."""
    bf16_layers_at_end: NonNegativeInt = 0
    """Last layers that stay in the model's type. Not with "delayed"."""
    amax_history: PositiveInt = 1
    """Passes whose largest value defines the scale of "delayed"."""
    margin: NonNegativeInt = 0
    """Halvings of the scale of "delayed", as room for growing values."""

    def __post_init__(self) -> None:
        delayed, layers = self.recipe == "delayed", self.bf16_layers
        require(self.recipe is not None or not layers, "recipe=null turns FP8 off; name a recipe")
        require(not (delayed and layers), "bf16_layers_at_start and bf16_layers_at_end exclude recipe=delayed")
        require(delayed or (self.amax_history, self.margin) == (1, 0), "amax_history and margin need recipe=delayed")

    @property
    def bf16_layers(self) -> int:
        return self.bf16_layers_at_start + self.bf16_layers_at_end

    @property
    def multiple(self) -> int:
        """Divisor of a rank's tokens and of the sides of its weight matrices; 1 without FP8."""
        return 1 if self.recipe is None else _MULTIPLE[self.recipe]

    @property
    def mcore_recipe(self) -> str:
        """Megatron's name of the recipe."""
        assert self.recipe is not None
        return "tensorwise" if self.recipe == "current" else self.recipe


def check_fp8_layout(sizes: Mapping[str, int], fp8: Fp8Config, parallel: ParallelConfig, prefix: str) -> None:
    """Raise UserError unless every weight matrix of the layers has FP8 products on every rank.

    `sizes` as for `check_layout`, with hidden_size, kv_channels (per head) and dense_layers (without experts); `prefix`
    begins names in messages.
    """
    if fp8.recipe is None:
        return
    given = [parallel.first_stage_layers, parallel.last_stage_layers]
    others = parallel.pipeline - sum(layers is not None for layers in given)
    even = (sizes["num_layers"] - sum(layers or 0 for layers in given)) // max(1, others)
    for name, layers in zip(("bf16_layers_at_start", "bf16_layers_at_end"), given, strict=True):
        stage = even if layers is None else layers
        if getattr(fp8, name) > stage:
            raise UserError(f"fp8.{name}={getattr(fp8, name)} exceeds the {stage} layers of a pipeline stage; lower it")
    head, heads, groups = sizes["kv_channels"], sizes["num_attention_heads"], sizes["num_query_groups"]
    sides = {
        f"{prefix}hidden_size": sizes["hidden_size"],
    }
    if sizes["dense_layers"]:
        sides[f"{prefix}ffn_hidden_size / parallel.tensor"] = sizes["ffn_hidden_size"] // parallel.tensor
    if sizes.get("num_experts"):
        shared = sizes.get("shared_expert_size", 0)
        sides[f"{prefix}shared_expert_size / parallel.tensor"] = shared // parallel.tensor
        experts = sizes["moe_ffn_hidden_size"] // parallel.expert_tensor_size
        sides[f"{prefix}moe_ffn_hidden_size / parallel.expert_tensor"] = experts
    if "kv_lora_rank" not in sizes:  # latent attention has other products
        sides |= {
            "the heads' width / parallel.tensor": heads * head // parallel.tensor,
            "the width of queries, keys and values / parallel.tensor": (heads + 2 * groups) * head // parallel.tensor,
        }
    for name, size in sides.items():
        if size % fp8.multiple:
            needed = f"fp8.recipe={fp8.recipe} needs multiples of {fp8.multiple}"
            raise UserError(f"{needed}, and {name} is {size}; take another recipe or layout")


def check_fp8_device(fp8: Fp8Config, capability: Version | None, cuda: Version) -> None:
    """Raise UserError unless a GPU of this compute capability (None: no GPU) and torch's CUDA support the recipe."""
    if fp8.recipe is None:
        return
    if capability is None:
        raise UserError(f"fp8.recipe={fp8.recipe} needs a GPU; set fp8.recipe=null")
    recipes = device_recipes(capability, cuda)
    if fp8.recipe not in recipes:
        gpu = f"compute capability {capability[0]}.{capability[1]} with CUDA {cuda[0]}.{cuda[1]}"
        raise UserError(
            f"fp8.recipe={fp8.recipe} does not run at {gpu}; recipes that do: {', '.join(recipes) or 'none'}"
        )


def device_recipes(capability: Version, cuda: Version) -> list[Fp8Recipe]:
    """Return the recipes that a GPU supports."""
    return [
        recipe
        for recipe, (lowest, too_high, oldest) in _DEVICE.items()
        if lowest <= capability < too_high and cuda >= oldest
    ]
