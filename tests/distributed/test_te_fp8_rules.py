"""Transformer Engine's own FP8 on kernels in torch operations: quantizers, quantized tensors and layers, to the bit by
the published rules in numpy; and settings that reach its recipes.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import fp8_rules
import pytest
import te_ranks
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from ranks import VOCAB, run_config
from te_ranks import BLACKWELL, HOPPER, needs_te
from torch import Tensor

from megatron_aspo.config.fp8 import Fp8Config
from megatron_aspo.config.model import ModelConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.policy.model import build_gpt, read_architecture
from megatron_aspo.policy.parallel import initialize_parallel
from megatron_aspo.ranks.process_group import distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow, needs_te]

RECIPES = ["delayed", "current", "blockwise", "mxfp8"]
FORMATS = {7: fp8_rules.E4M3, 8: fp8_rules.E5M2}
"""Transformer Engine's number of a format -> its values."""
# Blocks of 128 stay whole on two tensor-parallel ranks.
DENSE = ModelConfig(
    hidden_size=256,
    ffn_hidden_size=256,
    num_attention_heads=4,
    num_query_groups=4,
    max_sequence_length=64,
    init_std=0.1,
    dtype="bfloat16",
)
EXPERTS = replace(DENSE, num_experts=4, moe_ffn_hidden_size=256)


def capability(recipe: str | None) -> tuple[int, int]:
    return BLACKWELL if recipe == "mxfp8" else HOPPER


def fp8(recipe: Any, **fields: Any) -> Fp8Config:
    return Fp8Config(recipe=recipe, **({"amax_history": 3} if recipe == "delayed" else {}), **fields)


# --- Buffers ---


def wrong_buffers() -> list[str]:
    """Differences between the buffers of quantized tensors and those that Transformer Engine's own quantizers
    specify, in every usage: of new tensors, and of tensors that had others."""
    from te_reference.quantize import create_empty_quantized_tensor, quantize, split_quantize
    from te_reference.registry import capability
    from te_reference.tensors import classes

    c, wrong = classes(), []
    code = 7  # E4M3
    makers: dict[str, Any] = {"current": lambda **usage: c.Current(code, "cpu", **usage)}
    if capability() == BLACKWELL:
        makers["mxfp8"] = lambda **usage: c.MX(code, **usage)
    else:
        makers["blocks"] = lambda **usage: c.Block(code, block_scaling_dim=1, **usage)
        makers["square blocks"] = lambda **usage: c.Block(code, block_scaling_dim=2, **usage)
    x = torch.randn(3, 64, 160).bfloat16()
    for name, make in makers.items():
        for usage in ({"rowwise": True, "columnwise": False}, {"rowwise": True, "columnwise": True}):
            quantizer = make(**usage)
            specified = quantizer.inner_tensor_specs(tuple(x.shape))
            other = make(rowwise=True, columnwise=not usage["columnwise"])
            for how, made in {
                "new": create_empty_quantized_tensor(quantizer, x.shape, x.dtype, "cuda"),
                "quantized": quantize(x, quantizer),
                "converted": quantize(x, quantizer, quantize(x, other)),
                "split": split_quantize(x.flatten(0, 1), [64, 128], [quantizer, quantizer])[1],
            }.items():
                if how == "split":
                    specified = quantizer.inner_tensor_specs((128, 160))
                names = [n for n in vars(made) if n.endswith(("_data", "_transpose", "_scale_inv"))]
                found = {n: getattr(made, n) for n in names if getattr(made, n) is not None}
                if {n: (tuple(t.shape), t.dtype) for n, t in found.items()} != specified:
                    wrong.append(f"{name} {usage} {how}: {sorted(found)}, not {sorted(specified)}")
    return wrong


@pytest.mark.parametrize("gpu", [HOPPER, BLACKWELL], ids=["hopper", "blackwell"])
def test_buffers_of_quantized_tensors(gpu: tuple[int, int]) -> None:
    assert te_ranks.run(1, wrong_buffers, capability=gpu) == [[]]


def amaxes_of_delayed_scaling() -> list[Any]:
    from te_reference.quantize import quantize
    from te_reference.tensors import classes, operand

    quantizer = classes().Delayed(torch.tensor([2.0]), torch.zeros(1), 7)
    x = torch.tensor([[1.0, -300.0] * 8] * 16)
    made = quantize(x, quantizer)
    kept = operand(made, False).clone()
    quantize(3 * x, quantizer, made, torch.ones(1))
    same = torch.equal(operand(made, False), kept)
    quantize(x / 2, quantizer, made)
    return [kept[0, :2].tolist(), same, float(quantizer.amax), operand(made, True)[0, :2].tolist()]


def test_delayed_scaling_of_a_tensor() -> None:
    """Values saturate, the largest magnitude accumulates, and a set flag leaves everything as it is."""
    (found,) = te_ranks.run(1, amaxes_of_delayed_scaling)
    assert found == [[1.0, -224.0], True, 300.0, [0.5, -144.0]]


# --- Tensors and layers, to the bit ---


def small_gpt(config: RunConfig) -> Any:
    """Transformer Engine's layers without the wrappers for training, and packed streams."""
    initialize_parallel(config.parallel, config.seed)
    (model,) = build_gpt(config, read_architecture(config.model, config.parallel, VOCAB), VOCAB)
    return model.bfloat16()


def streams(count: int) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Inputs and labels of `count` packed streams of 256 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = [100, 60, 96]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths])
    packed = PackedSeqParams("thd", cu_seqlens, cu_seqlens, max_seqlen_q=100, max_seqlen_kv=100)
    for _ in range(count):
        tokens, labels = torch.randint(VOCAB, (2, 1, 256), generator=generator)
        inputs = {"input_ids": tokens, "position_ids": positions[None], "attention_mask": None}
        yield inputs | {"packed_seq_params": packed}, labels


def take_pass(gpt: Any, inputs: dict[str, Any], labels: Tensor) -> None:
    gpt.zero_grad()
    gpt.set_is_first_microbatch()  # as Megatron's schedules do
    gpt(**inputs, labels=labels).float().mean().backward()


def count_differences(recipe: str) -> dict[str, int]:
    """How many tensors and values are quantized from now on, and how many values differ from the rules."""
    from te_reference import quantize, tensors
    from te_reference.enums import DType
    from te_reference.rounding import as_matrix

    counts = {"tensors": 0, "values": 0, "different": 0}

    def compare(x: Tensor, quantizer: Any, out: Any) -> None:
        format = fp8_rules.E4M3 if int(quantizer.dtype) == DType.kFloat8E4M3 else fp8_rules.E5M2
        square = getattr(quantizer, "block_scaling_dim", 1) == 2
        scale = float(quantizer.scale) if recipe == "delayed" else None
        names = ("_data", "_transpose") if hasattr(out, "_data") else ("_rowwise_data", "_columnwise_data")
        for columnwise, name in enumerate(names):
            if getattr(out, name) is not None:
                expected = fp8_rules.rounded(
                    recipe, as_matrix(x), format, columnwise=bool(columnwise), square=square, scale=scale
                )
                counts["tensors"] += 1
                counts["values"] += x.numel()
                counts["different"] += int((tensors.operand(out, bool(columnwise)) != expected).sum())

    quantize.observers.append(compare)
    return counts


def count_quantized(config: RunConfig) -> dict[str, int]:
    """Counts of two passes."""
    assert config.fp8.recipe is not None
    counts = count_differences(config.fp8.recipe)
    with distributed(config), torch.enable_grad():
        gpt = small_gpt(config)
        for inputs, labels in streams(2):
            take_pass(gpt, inputs, labels)
    return counts


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_every_quantized_tensor(recipe: str, model: ModelConfig) -> None:
    format: Any = "hybrid" if model is DENSE else "e4m3"
    config = run_config(model=replace(model, num_layers=1), fp8=fp8(recipe, format=format))
    (counts,) = te_ranks.run(1, count_quantized, config, capability=capability(recipe))
    assert counts["tensors"] > 20
    assert counts["values"] > 1_000_000
    assert counts["different"] == 0


def random(shape: tuple[int, int], magnitude: float, dtype: torch.dtype) -> Tensor:
    """Normal values whose magnitudes vary over rows and columns too; one row is zero."""
    x = torch.randn(shape) * magnitude * torch.logspace(-2, 2, shape[0])[:, None] * torch.logspace(1, -1, shape[1])
    x[shape[0] // 2] = 0
    return x.to(dtype)


def wrongly_rounded(recipe: str) -> list[str]:
    """Tensors that the recipe's quantizers round otherwise than its rules: of any magnitude, to the ends of float32."""
    from te_reference import quantize, tensors

    c, wrong = tensors.classes(), []
    makers = {
        "current": [lambda code: c.Current(code, "cpu", rowwise=True, columnwise=True)],
        "blockwise": [
            lambda code: c.Block(code, block_scaling_dim=1, rowwise=True, columnwise=True),
            lambda code: c.Block(code, block_scaling_dim=2, rowwise=True, columnwise=True),
        ],
        "mxfp8": [lambda code: c.MX(code, rowwise=True, columnwise=True)],
    }[recipe]
    inputs: dict[str, Tensor] = {}
    for dtype, magnitude, shape in itertools.product(
        (torch.float32, torch.bfloat16), (1e-6, 1.0, 1e6), ((128, 256), (96, 160))
    ):
        inputs[f"{dtype} {magnitude} {shape}"] = random(shape, magnitude, dtype)
    for largest in (1e-44, 2.0**-127, 1e-37, 3e-36, 1e30, 3.4e38, math.inf):
        x = random((32, 64), 1.0, torch.float32)
        inputs[f"largest {largest}"] = x * min(largest, 1e30) / x.abs().max()
        inputs[f"largest {largest}"][0, 0] = largest
    for (name, x), make, (code, format) in itertools.product(inputs.items(), makers, FORMATS.items()):
        out = quantize.quantize(x, make(code))
        square = getattr(out, "_is_2D_scaled", False)
        for columnwise in (False, True):
            expected = fp8_rules.rounded(recipe, x, format, columnwise=columnwise, square=square)
            if not torch.equal(tensors.operand(out, columnwise), expected):
                wrong.append(f"{name}, code {code}, square={square}, columnwise={columnwise}")
    return wrong


@pytest.mark.parametrize("recipe", RECIPES[1:])
def test_quantizers_at_any_magnitude(recipe: str) -> None:
    """Scales at the ends of their range; 1 for an infinity, in the formats whose scales are float32."""
    assert te_ranks.run(1, wrongly_rounded, recipe, capability=capability(recipe)) == [[]]


def errors_of_a_layer(config: RunConfig) -> tuple[list[float], bool]:
    """Errors of output, input gradient and weight gradient on normal data; whether tokens are rounded alike if others
    of the stream are larger."""
    from megatron.core.fp8_utils import get_fp8_recipe

    te: Any = importlib.import_module("transformer_engine.pytorch")
    with distributed(config):
        gpt = small_gpt(config)
        linear = te.Linear(384, 128, bias=False, params_dtype=torch.float32, device="cpu")
        x, dy = torch.randn(256, 384, requires_grad=True), torch.randn(256, 128)
        with torch.no_grad():
            linear.weight.normal_()

        def multiply(x: Tensor) -> Tensor:
            with te.fp8_autocast(enabled=True, fp8_recipe=get_fp8_recipe(gpt.config)):
                return linear(x)

        multiply(x).backward(dy)
        w = linear.weight.detach()
        with torch.no_grad():
            pairs = [(multiply(x), x @ w.t()), (x.grad, dy @ w), (linear.weight.grad, dy.t() @ x)]
            errors = [float((found - exact).norm() / exact.norm()) for found, exact in pairs]
            y = multiply(x)
            x[0] *= 5
            return errors, torch.allclose(multiply(x)[128:], y[128:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES[1:])
@pytest.mark.parametrize(("format", "gradient_error"), [("hybrid", 0.059), ("e4m3", 0.0375)])
def test_the_error_of_a_layer(recipe: str, format: Any, gradient_error: float) -> None:
    """On normal data an E4M3 operand has an error of 2.65 %, an E5M2 one of 5.25 %. For a product the squares add
    up."""
    config = run_config(model=replace(DENSE, num_layers=1), fp8=fp8(recipe, format=format))
    ((errors, is_alone),) = te_ranks.run(1, errors_of_a_layer, config, capability=capability(recipe))
    assert errors == pytest.approx([0.0375, gradient_error, gradient_error], rel=0.05)
    assert is_alone == (recipe != "current")


def layers_and_rules(config: RunConfig) -> dict[str, list[bool]]:
    """Whether output, weight gradient and (where it is the layer's own) input gradient of each linear layer have the
    bits of a product of rounded operands, in the third pass."""
    from te_reference.norms import rmsnorm_fwd

    recipe = config.fp8.recipe
    assert recipe is not None
    gradient = fp8_rules.E5M2 if config.fp8.format == "hybrid" else fp8_rules.E4M3
    seen: dict[str, dict[str, Any]] = {}
    same: dict[str, list[bool]] = {}

    def watch(name: str, module: Any) -> None:
        def keep(_: Any, inputs: Any, outputs: Any) -> None:
            seen[name] = {"x": inputs[0].detach(), "y": outputs[0].detach()}
            inputs[0].register_hook(lambda g: seen[name].update(dx=g))
            outputs[0].register_hook(lambda g: seen[name].update(dy=g))

        module.register_forward_hook(keep)

    with distributed(config):
        gpt = small_gpt(config)
        linears = {
            n: m for n, m in gpt.named_modules() if hasattr(m, "fp8_meta") and hasattr(m, "weight") and "linear" in n
        }
        for name, module in linears.items():
            watch(name, module)
        scales: dict[str, list[float]] = {}
        for i, (inputs, labels) in enumerate(streams(3)):
            if recipe == "delayed" and i == 2:
                for name, module in linears.items():
                    states = [module.fp8_meta["scaling_fwd"].scale, module.fp8_meta["scaling_bwd"].scale]
                    scales[name] = [float(states[0][0]), float(states[0][1]), float(states[1][0])]
            take_pass(gpt, inputs, labels)
        for name, module in linears.items():
            x, w, found = seen[name]["x"].flatten(0, -2), module.weight.detach(), seen[name]
            dy = found["dy"].flatten(0, -2)
            is_normed = hasattr(module, "layer_norm_weight")
            if is_normed:  # with delayed scaling the norm's kernel quantizes, before it rounds to bfloat16
                kind = torch.float32 if recipe == "delayed" else x.dtype
                x = rmsnorm_fwd(x, module.layer_norm_weight.detach(), module.eps, None, None, kind, 0, False)[0]

            def operands(columnwise: bool) -> list[Tensor]:
                tensors = [(x, fp8_rules.E4M3, False), (w, fp8_rules.E4M3, True), (dy, gradient, False)]  # noqa: B023
                of = scales.get(name, [None] * 3)  # noqa: B023
                return [
                    fp8_rules.rounded(recipe, t, format, columnwise=columnwise, square=square, scale=scale)
                    for (t, format, square), scale in zip(tensors, of, strict=True)
                ]

            (x_row, w_row, dy_row), (x_column, w_column, dy_column) = operands(False), operands(True)
            pairs = [(found["y"].flatten(0, -2), x_row @ w_row.t()), (module.weight.grad, dy_column.t() @ x_column)]
            if not is_normed:
                pairs.append((found["dx"].flatten(0, -2), dy_row @ w_column))
            same[name] = [torch.equal(a, b.to(a.dtype)) for a, b in pairs]
    return same


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_linear_layer(recipe: str) -> None:
    config = run_config(model=replace(DENSE, num_layers=1), fp8=fp8(recipe))
    (same,) = te_ranks.run(1, layers_and_rules, config, capability=capability(recipe))
    lengths = {name.rpartition(".")[2]: len(parts) for name, parts in same.items()}
    assert lengths == {"linear_qkv": 2, "linear_proj": 3, "linear_fc1": 2, "linear_fc2": 3}
    assert all(all(parts) for parts in same.values()), same


def recipe_objects(config: RunConfig) -> dict[str, Any]:
    """The recipe that Megatron-Core makes from the configuration, and the classes of a layer."""
    from megatron.core.fp8_utils import get_fp8_recipe

    from megatron_aspo.config.installed import find_accelerators

    with distributed(config):
        gpt = small_gpt(config)
        recipe: Any = get_fp8_recipe(gpt.config)
        layer = gpt.decoder.layers[-1]
        ((inputs, labels),) = streams(1)
        take_pass(gpt, inputs, labels)
        return {
            "adam": find_accelerators().adam,
            "kind": [recipe.delayed(), recipe.float8_current_scaling(), recipe.float8_block_scaling(), recipe.mxfp8()],
            "format": recipe.fp8_format.name,
            "linears": [type(m).__name__ for m in (layer.self_attention.linear_qkv, layer.self_attention.linear_proj)],
            "exact": sorted(n for n, m in gpt.named_modules() if "linear_" in n and not m.fp8),
            "output": gpt.config.fp8_output_proj,
            "history": [getattr(recipe, "amax_history_len", None), getattr(recipe, "margin", None)],
        }


@pytest.mark.parametrize(
    ("recipe", "format", "start"),
    [("delayed", "hybrid", 0), ("current", "hybrid", 1), ("blockwise", "e4m3", 1), ("mxfp8", "e4m3", 0)],
)
def test_settings_reach_the_recipe(recipe: str, format: Any, start: int) -> None:
    config = run_config(model=DENSE, fp8=fp8(recipe, format=format, bf16_layers_at_start=start))
    (made,) = te_ranks.run(1, recipe_objects, config, capability=capability(recipe))
    assert made["adam"] == "Transformer Engine"
    assert made["kind"] == [name == recipe for name in RECIPES]
    assert made["format"] == format.upper()
    assert made["linears"] == ["TELayerNormColumnParallelLinear", "TERowParallelLinear"]
    parts = ("mlp.linear_fc1", "mlp.linear_fc2", "self_attention.linear_proj", "self_attention.linear_qkv")
    assert made["exact"] == [f"decoder.layers.{i}.{part}" for i in range(start) for part in parts]
    assert made["output"] is False
    if recipe == "delayed":
        assert made["history"] == [3, 0]
