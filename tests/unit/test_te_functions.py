"""The torch functions that stand in for Transformer Engine's kernels, each by itself: float64, finite differences,
published rounding rules. Those of quantized tensors need Transformer Engine's classes: see test_te_fp8.py."""

from __future__ import annotations

import itertools
import math
from typing import Any

import fp8_rules
import numpy as np
import pytest
import torch
from te_reference import attention, gemm, norms, optimizer, permutation, rope, rounding, thd
from te_reference.enums import BiasType, DType, MaskType, QkvFormat, QkvLayout, SoftmaxType, torch_dtype
from te_reference.quantize import fp8_transpose, fused_amax_and_scale_update_after_reduction, swap_first_dims
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = [(E4M3, fp8_rules.E4M3), (E5M2, fp8_rules.E5M2)]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


# --- Rounding ---


@pytest.mark.parametrize(("code", "values"), FORMATS)
def test_casts_take_the_nearest_code_and_saturate(code: torch.dtype, values: Any) -> None:
    middles = torch.from_numpy((values[1:] + values[:-1]) / 2)
    beyond = torch.tensor([float(values[-1]) * 1.01, 1e30, math.inf])
    x = torch.cat([torch.from_numpy(values), middles, torch.nextafter(middles, middles * 2), beyond, torch.randn(999)])
    x = torch.cat([x, -x])
    found = rounding.cast(x, code)
    assert found.dtype == torch.uint8
    assert np.array_equal(found.view(code).float().numpy(), fp8_rules.nearest(x.numpy(), values))
    assert rounding.cast(torch.tensor([math.nan]), code).view(code).isnan().all()


MAGNITUDES = torch.cat(
    [torch.logspace(-44, 38, 997), torch.tensor([0.0, 448.0, 57344.0, 2.0**-126, 2.0**-127, 3.4e38])]
)


@pytest.mark.parametrize(("code", "values"), FORMATS)
def test_scales(code: torch.dtype, values: Any) -> None:
    limit = torch.finfo(code).max
    full = rounding.scale_from_amax(MAGNITUDES, limit)
    assert np.array_equal(full.numpy(), fp8_rules.quotient(MAGNITUDES.numpy(), values))
    power = rounding.scale_from_amax(MAGNITUDES, limit, power_of_two=True)
    assert np.array_equal(power.numpy(), fp8_rules.power_of_two(MAGNITUDES.numpy(), values))
    assert ((power <= full) & (full < 2 * power)).all()
    strange = torch.tensor([math.inf, math.nan, 0.0])
    assert torch.equal(rounding.scale_from_amax(strange, limit), torch.ones(3))
    assert rounding.scale_from_amax(torch.tensor(1e-3), limit, epsilon=1.0) == limit
    assert rounding.scale_from_amax(torch.tensor(1e-44), limit, value_for_infinity=7.0) == 7


@pytest.mark.parametrize(("code", "values"), FORMATS)
def test_block_exponents(code: torch.dtype, values: Any) -> None:
    """The scaled magnitude does not exceed the range, and is more than half of it, within E8M0's own range."""
    exponent = rounding.e8m0_exponent(MAGNITUDES, code)
    scale = rounding.reciprocal_power_of_two(exponent)
    assert np.array_equal(scale.numpy(), fp8_rules.e8m0(MAGNITUDES.numpy(), values))
    assert torch.equal(scale * rounding.power_of_two(exponent), torch.ones_like(scale))
    usual = (MAGNITUDES > 1e-30) & (MAGNITUDES < 1e30)
    scaled = (MAGNITUDES * scale)[usual] / torch.finfo(code).max
    assert ((scaled > 0.49999) & (scaled <= 1.00001)).all()
    strange = rounding.e8m0_exponent(torch.tensor([0.0, math.inf, math.nan]), code)
    assert strange.tolist() == [0, 254, 255]
    assert rounding.power_of_two(strange).isnan().tolist() == [False, False, True]


def test_blocks() -> None:
    x = torch.arange(12.0).view(3, 4)
    amax = rounding.block_amax(x, 2, 3)
    assert amax.tolist() == [[6, 7], [10, 11]]
    spread = rounding.spread_blocks(amax, 2, 3, (3, 4))
    assert spread.tolist() == [[6, 6, 6, 7], [6, 6, 6, 7], [10, 10, 10, 11]]
    assert rounding.largest_magnitude(torch.empty(0)) == 0
    assert rounding.largest_magnitude(torch.tensor([-3.0, 2.0])) == 3


@pytest.mark.parametrize("length", [1, 3])
def test_scales_of_delayed_scaling(length: int) -> None:
    history, scale = torch.zeros(length, 1), torch.ones(1)
    seen: list[float] = []
    for amax in [8.0, 2.0, 0.0, 4.0, math.inf, 1e-44]:
        fused_amax_and_scale_update_after_reduction(
            torch.tensor([amax]), [history], [scale], "max", DType.kFloat8E4M3, 1
        )
        seen = [*seen, amax][-length:]
        largest = max(seen)
        if 0 < largest < math.inf:
            expected = min(224 / float(torch.tensor(largest)), torch.finfo(torch.float32).max)
        assert float(scale) == pytest.approx(expected)
        assert history[0] == 0
    newest = history.clone()
    fused_amax_and_scale_update_after_reduction(
        torch.tensor([16.0]), [history], [scale], "most_recent", DType.kFloat8E5M2, 0
    )
    assert scale == 57344 / 16
    assert torch.equal(history[:-1][1:], newest[1:][1:]) or length == 1


# --- Products ---


def product(a: Tensor, trans_a: bool, b: Tensor, trans_b: bool, **changed: Any) -> list[Any]:
    arguments: dict[str, Any] = {
        "D": None, "quantizer": None, "output_dtype": None, "bias": None, "bias_type": None, "gelu": False,
        "gelu_in": None, "grad": False, "workspace": None, "workspace_size": 0, "accumulate": False,
        "use_split_accumulator": False,
    }  # fmt: skip
    return gemm.generic_gemm(a, trans_a, b, trans_b, **(arguments | changed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products(dtype: torch.dtype) -> None:
    x, w, dy = (torch.randn(shape).to(dtype) for shape in [(2, 5, 8), (6, 8), (2, 5, 6)])
    bias = torch.randn(6).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    y = product(w, True, x, False, bias=bias)[0]
    close(y, x.double() @ w.double().t() + bias.double(), tolerance)
    assert y.dtype == dtype
    dx = product(w, False, dy, False, grad=True)[0]
    close(dx, dy.double() @ w.double(), tolerance)
    total = torch.randn(6, 8)
    start = total.clone()
    out, db, _, _ = product(
        x, False, dy, True, D=total, output_dtype=DType.kFloat32, bias=bias, grad=True, accumulate=True
    )
    dw = dy.double().flatten(0, 1).t() @ x.double().flatten(0, 1)
    assert out is total
    close(out, start + dw, tolerance)
    close(db, dy.double().sum((0, 1)), tolerance)
    close(product(w, True, x, False, alpha=0.5)[0], 0.5 * x.double() @ w.double().t(), tolerance)
    assert product(w, True, x[:0], False)[0].shape == (0, 5, 6)
    with pytest.raises(AssertionError, match="dims"):
        product(w, True, x, False, D=torch.empty(3, 3))


def test_products_of_experts() -> None:
    sizes = [3, 0, 4]
    x = [torch.randn(n, 8) for n in sizes]
    w, dy = [torch.randn(6, 8) for _ in sizes], [torch.randn(n, 6) for n in sizes]
    none: list[Any] = [torch.empty(0)] * 3

    def grouped(a: Any, trans_a: bool, b: Any, trans_b: bool, out: Any, single: bool, accumulate: bool = False) -> None:
        gemm.te_general_grouped_gemm(
            a, trans_a, b, trans_b, out, None, sizes, none, None, single, None, False, None, 0, accumulate, False
        )

    y = torch.full((7, 6), math.nan)
    grouped(w, True, x, False, [y], single=True)
    close(y, torch.cat([a.double() @ b.double().t() for a, b in zip(x, w, strict=True)]))
    dw = [torch.ones(6, 8) for _ in sizes]
    grouped(x, False, dy, True, dw, single=False, accumulate=True)
    for found, a, b in zip(dw, dy, x, strict=True):
        close(found, 1 + a.double().t() @ b.double())
    assert gemm.get_num_cublas_streams() > 0


def test_transposes() -> None:
    x = torch.randint(255, (2, 3, 5), dtype=torch.uint8)
    assert torch.equal(fp8_transpose(x, DType.kFloat8E4M3), x.permute(2, 0, 1))
    out = torch.empty(5, 6, dtype=torch.uint8)
    assert fp8_transpose(x, DType.kFloat8E4M3, out=out) is out
    assert torch.equal(out, x.view(6, 5).t())
    assert torch.equal(swap_first_dims(x), x.transpose(0, 1))


# --- Norms, rotary embeddings ---


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rmsnorm(dtype: torch.dtype, centered: bool) -> None:
    x, weight, dz = torch.randn(2, 7, 16).to(dtype), torch.randn(16).to(dtype), torch.randn(2, 7, 16).to(dtype)
    x64, weight64 = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + 1e-3) * (weight64 + centered)
    expected.backward(dz.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    y, mean, inverse = norms.rmsnorm_fwd(x, weight, 1e-3, None, None, dtype, 0, centered)
    assert mean is None
    close(y, expected.detach(), tolerance)
    dx, dgamma = norms.rmsnorm_bwd(dz, x, inverse, weight, 0, centered)
    assert x64.grad is not None
    assert weight64.grad is not None
    close(dx, x64.grad, tolerance)
    close(dgamma, weight64.grad, tolerance)
    assert dx.shape == x.shape


def test_rmsnorm_by_finite_differences() -> None:
    x, weight, dz = torch.randn(3, 8), torch.randn(8), torch.randn(3, 8)

    def value(x: Tensor) -> float:
        return float((norms.rmsnorm_fwd(x, weight, 1e-5, None, None, DType.kFloat32, 0, False)[0] * dz).sum())

    _, _, inverse = norms.rmsnorm_fwd(x, weight, 1e-5, None, None, DType.kFloat32, 0, False)
    dx, _ = norms.rmsnorm_bwd(dz, x, inverse, weight, 0, False)
    step = 1e-2 * torch.randn(3, 8)
    assert (value(x + step) - value(x - step)) / 2 == pytest.approx(float((dx * step).sum()), rel=0.02, abs=1e-4)


@pytest.mark.parametrize("cp_size", [1, 2])
def test_rotary_embeddings_of_packed_streams(cp_size: int) -> None:
    """Complex numbers multiplied by e^iθ; ranks hold an early and a late chunk of each sequence."""
    cu = torch.tensor([0, 4, 12])
    freqs = torch.randn(12, 1, 1, 4).repeat(1, 1, 1, 2)
    positions = torch.cat([torch.arange(4), torch.arange(8)])
    x, y = torch.randn(12, 3, 10), torch.randn(12, 3, 10)
    angle = freqs[positions, 0, 0, :4].double()[:, None]
    turned = torch.complex(x[..., :4].double(), x[..., 4:8].double()) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag, x[..., 8:].double()], -1)
    for rank in range(cp_size):
        chunks = [torch.arange(s, e).chunk(2 * cp_size) for s, e in itertools.pairwise(cu.tolist())]
        part = (
            torch.cat([torch.cat([c[rank], c[2 * cp_size - 1 - rank]]) for c in chunks])
            if cp_size > 1
            else torch.arange(12)
        )
        arguments = (freqs, None, QkvFormat.NVTE_THD, False, cu, cp_size, rank)
        found = rope.fused_rope_forward(x[part], *arguments)
        close(found, expected[part])
        back = rope.fused_rope_backward(y[part], *arguments)
        assert float((found * y[part]).sum()) == pytest.approx(float((x[part] * back).sum()), rel=1e-4)


def test_rotary_embeddings_of_batches() -> None:
    freqs = torch.randn(6, 1, 1, 4).repeat(1, 1, 1, 2)
    x = torch.randn(5, 2, 3, 8)
    found = rope.fused_rope_forward(x, freqs, None, QkvFormat.NVTE_SBHD, False, None, 1, 0)
    cu = torch.tensor([0, 5])
    for i in range(2):
        one = rope.fused_rope_forward(x[:, i], freqs, None, QkvFormat.NVTE_THD, False, cu, 1, 0)
        assert torch.equal(found[:, i], one)
    turned = rope.fused_rope_forward(x.transpose(0, 1), freqs, None, QkvFormat.NVTE_BSHD, False, None, 1, 0)
    assert torch.equal(turned.transpose(0, 1), found)


# --- Attention ---


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    mask: str,
    layout: str,
    window: Any = (-1, -1),
    padded: Any = None,
) -> tuple[Tensor, Tensor]:
    form = getattr(QkvFormat, f"NVTE_{layout.partition('_')[0]}")
    out, lse, _ = attention.fused_attn_fwd(
        0, 0, True, 0.3, 0.0, True, getattr(QkvLayout, f"NVTE_{layout}"), form, None, BiasType.NVTE_NO_BIAS,
        getattr(MaskType, f"NVTE_{mask}_MASK"), SoftmaxType.NVTE_VANILLA_SOFTMAX, window, False, cu_q, cu_k, q, k, v,
        None, padded, padded, None, None, None, None, None, None, None, 0, False, False,
    )  # fmt: skip
    return out, lse


def attend_back(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, do: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, mask: str,
    layout: str, window: Any = (-1, -1), padded: Any = None,
) -> list[Tensor]:  # fmt: skip
    form = getattr(QkvFormat, f"NVTE_{layout.partition('_')[0]}")
    name = getattr(QkvLayout, f"NVTE_{layout}")
    return attention.fused_attn_bwd(
        0, 0, 0.3, 0.0, True, name, form, form, name, None, None, BiasType.NVTE_NO_BIAS,
        getattr(MaskType, f"NVTE_{mask}_MASK"), SoftmaxType.NVTE_VANILLA_SOFTMAX, window, False, True, cu_q, cu_k,
        q, k, v, o, do, None, [lse], padded, padded, None, None, None, False,
    )[:3]  # fmt: skip


def oracle(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """One sequence in float64: [queries, h, d], [keys, g, d] -> output and log-sum-exp [h, queries]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = 0.3 * torch.einsum("qhd,khd->hqk", q, k)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)


@pytest.mark.parametrize("mask", ["PADDING_CAUSAL", "PADDING", "PADDING_CAUSAL_BOTTOM_RIGHT"])
def test_attention_over_packed_streams(mask: str) -> None:
    """Grouped queries, values of another width, a gap between sequences, fewer queries than keys."""
    cu_q, cu_k, padded = torch.tensor([0, 3, 8]), torch.tensor([0, 4, 10]), torch.tensor([0, 6, 12])
    q, k, v, do = torch.randn(12, 4, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 6), torch.randn(12, 4, 6)
    tensors: Any = [x.double().requires_grad_() for x in (q, k, v)]
    expected, lses = torch.zeros(12, 4, 6, dtype=torch.float64), []
    for n, m, start in [(3, 4, 0), (5, 6, 6)]:
        ahead = torch.arange(m) - torch.arange(n)[:, None] > (m - n if "RIGHT" in mask else 0)
        at: Any = [x[start : start + size] for x, size in zip(tensors, (n, m, m), strict=True)]
        out, lse = oracle(at[0], at[1], at[2], ahead if "CAUSAL" in mask else None)
        expected[start : start + n] = out
        lses.append((start, n, lse))
    expected.backward(do.double())
    out, lse = attend(q, k, v, cu_q, cu_k, mask, "THD_THD_THD", padded=padded)
    close(out, expected.detach())
    for start, n, wanted in lses:
        close(lse[start : start + n, :, 0].t(), wanted.detach())
    gradients = attend_back(q, k, v, out, do, lse, cu_q, cu_k, mask, "THD_THD_THD", padded=padded)
    for found, tensor in zip(gradients, tensors, strict=True):
        assert tensor.grad is not None
        close(found, tensor.grad)


@pytest.mark.parametrize("layout", ["SBHD_SBHD_SBHD", "BSHD_BSHD_BSHD"])
def test_attention_over_batches_with_a_window(layout: str) -> None:
    q, k, v, do = (torch.randn(2, 7, 3, 8) for _ in range(4))
    cu = torch.tensor([0, 7, 14])
    distance = torch.arange(7) - torch.arange(7)[:, None]
    tensors: Any = [x.double().requires_grad_() for x in (q, k, v)]
    expected = torch.stack(
        [oracle(tensors[0][i], tensors[1][i], tensors[2][i], (distance > 0) | (distance < -2))[0] for i in range(2)]
    )
    expected.backward(do.double())
    q, k, v, do = (x.transpose(0, 1) if layout[0] == "S" else x for x in (q, k, v, do))
    out, lse = attend(q, k, v, cu, cu, "CAUSAL", layout, (2, 0))
    gradients = attend_back(q, k, v, out, do, lse, cu, cu, "CAUSAL", layout, (2, 0))
    for found, wanted in zip([out, *gradients], [expected.detach(), *(x.grad for x in tensors)], strict=True):
        assert wanted is not None
        close(found.transpose(0, 1) if layout[0] == "S" else found, wanted)


def test_attention_by_finite_differences() -> None:
    cu, mask, layout = torch.tensor([0, 5]), "PADDING_CAUSAL", "THD_THD_THD"
    q, k, v, do = (torch.randn(5, 2, 4) for _ in range(4))

    def value(qkv: Tensor) -> float:
        return float((attend(qkv[0], qkv[1], qkv[2], cu, cu, mask, layout)[0] * do).sum())

    out, lse = attend(q, k, v, cu, cu, mask, layout)
    gradients = torch.stack(attend_back(q, k, v, out, do, lse, cu, cu, mask, layout))
    for i in range(3):
        step = torch.zeros(3, 5, 2, 4)
        step[i] = 1e-2 * torch.randn(5, 2, 4)
        middle = torch.stack([q, k, v])
        slope = (value(middle + step) - value(middle - step)) / 2
        assert slope == pytest.approx(float((gradients * step).sum()), rel=0.02, abs=1e-4)


@pytest.mark.parametrize("layout", ["T3HD", "TH3D", "THD_T2HD"])
def test_interleaved_gradients_are_views_of_one_buffer(layout: str) -> None:
    x = torch.randn(5, 2, 4)
    q, k, v = attention._gradients_like(x, x, x, getattr(QkvLayout, f"NVTE_{layout}"))
    assert q.shape == k.shape == v.shape == x.shape
    at = 4 if layout == "TH3D" else 8
    assert v.storage_offset() - k.storage_offset() == at
    assert (q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()) == ("3" in layout)


def test_which_types_have_fused_attention() -> None:
    class Parameters:
        qkv_dtype = DType.kBFloat16

    backend, reason = attention.get_fused_attn_backend(Parameters())
    assert (backend.name, reason) == ("NVTE_F16_arbitrary_seqlen", "")
    Parameters.qkv_dtype = DType.kFloat32
    backend, reason = attention.get_fused_attn_backend(Parameters())
    assert backend.name == "NVTE_No_Backend"
    assert reason
    assert attention.get_cudnn_version() >= 91200
    assert torch_dtype(DType.kBFloat16) == torch.bfloat16


# --- Packed streams in ring attention ---

CU = torch.tensor([0, 4, 12])
FIRST, SECOND = torch.tensor([0, 1, 4, 5, 6, 7]), torch.tensor([2, 3, 8, 9, 10, 11])


def test_halves_of_sequences() -> None:
    x = torch.randn(12, 2, 3)
    assert torch.equal(thd.thd_read_half_tensor(x, CU, 0), x[FIRST])
    assert torch.equal(thd.thd_read_half_tensor(torch.stack([x, -x]), CU, 1), torch.stack([x, -x])[:, SECOND])
    lse = torch.randn(2, 12)
    half = thd.thd_read_second_half_lse(lse, CU, True, 8)
    assert torch.equal(half, torch.cat([lse[:, SECOND], torch.zeros(2, 2)], 1))


@pytest.mark.parametrize("second_only", [False, True])
def test_parts_of_attention_sum_up(second_only: bool) -> None:
    """Attention to two parts of the keys, put together, is attention to all of them."""
    q, k, v = torch.randn(12, 2, 4), torch.randn(12, 2, 4), torch.randn(12, 2, 4)
    first, whole = (torch.randn(3, 2, 4), torch.randn(3, 2, 4)), []
    out, lse = torch.zeros(12, 2, 4), torch.zeros(2, 12)
    rows = SECOND if second_only else torch.arange(12)
    for i in range(12):
        o, stat = oracle(q[i : i + 1].double(), k[:6].double(), v[:6].double(), None)
        out[i], lse[:, i] = o[0].float(), stat[:, 0].float()
        keys: Any = [torch.cat([a[:6], b]).double() for a, b in zip((k, v), first, strict=True)]
        whole.append(oracle(q[i : i + 1].double(), keys[0], keys[1], None))
    steps = [oracle(q[i : i + 1].double(), first[0].double(), first[1].double(), None) for i in rows.tolist()]
    step = torch.cat([o for o, _ in steps]).float()
    step_lse = torch.cat([stat for _, stat in steps], 1).float()
    total = lse.clone()
    if second_only:
        thd.thd_second_half_lse_correction(total, step_lse, CU, True)
    else:
        total = torch.logaddexp(lse, step_lse)
    before = out.clone()
    thd.thd_out_correction(out, step, lse, total, step_lse, CU, second_only, True)
    for i in rows.tolist():
        close(out[i], whole[i][0][0])
        close(total[:, i], whole[i][1][:, 0])
    untouched = [i for i in range(12) if i not in rows.tolist()]
    assert torch.equal(out[untouched], before[untouched])


@pytest.mark.parametrize("actions", list(itertools.product(["add", "copy", "none"], repeat=2)))
def test_gradients_of_steps(actions: tuple[str, str]) -> None:
    """Each half of every sequence is added, copied or left."""
    grad = torch.randn(2, 12, 1, 3)
    start, rows = (
        grad.clone(),
        [part for part, action in zip((FIRST, SECOND), actions, strict=True) if action != "none"],
    )
    if not rows:
        return
    step = torch.randn(2, 12 if len(rows) == 2 else 6, 1, 3)
    thd.thd_grad_correction(grad, step, CU, *actions)
    for part, action in zip((FIRST, SECOND), actions, strict=True):
        source = step[:, part] if len(rows) == 2 else step
        expected = {"add": lambda: start[:, part] + source, "copy": lambda: source, "none": lambda: start[:, part]}  # noqa: B023
        assert torch.equal(grad[:, part], expected[action]())


# --- Tokens to experts ---


def test_the_map_of_routes() -> None:
    """The example in the comments of Transformer Engine's own function; rows that it calls useless are left out."""
    routing = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0]])
    found = permutation.make_row_id_map(routing, 5, 3)
    expected = [[3, 0, None, 1, 0, None, 2], [5, 1, None, 2, 0, None, 2], [6, None, None, 2, None, None, 1]]
    expected += [[4, 2, None, 1, 0, None, 2], [None] * 6 + [0]]
    for row, wanted in zip(found.tolist(), expected, strict=True):
        assert all(a == b for a, b in zip(row, wanted, strict=True) if b is not None)


@pytest.mark.parametrize("padded", [False, True])
def test_permutation_and_back(padded: bool) -> None:
    routing = torch.rand(9, 4) < 0.5
    probs = torch.rand(9, 4) * routing
    x = torch.randn(9, 6)
    counts = routing.sum(0)
    target = (counts + 3) // 4 * 4 if padded else counts
    offsets = (target - counts).cumsum(0) - (target - counts) if padded else None
    total = int(target.sum())
    ids = permutation.make_row_id_map(routing, 9, 4)
    rows, _, row_probs = permutation.permute_with_mask_map(x, ids, probs, None, offsets, 9, 4, total, 6, None)
    starts = target.cumsum(0) - target
    expected, expected_probs = torch.zeros(total, 6), torch.zeros(total)
    for e in range(4):
        tokens = routing[:, e].nonzero()[:, 0]
        expected[starts[e] : starts[e] + len(tokens)] = x[tokens]
        expected_probs[starts[e] : starts[e] + len(tokens)] = probs[tokens, e]
    assert row_probs is not None
    assert torch.equal(rows, expected)
    assert torch.equal(row_probs, expected_probs)
    back, back_probs = permutation.unpermute_with_mask_map(rows, ids, None, row_probs, offsets, 9, 4, 6)
    close(back, x * routing.sum(1, keepdim=True))
    assert back_probs is not None
    assert torch.equal(back_probs, probs)


def test_chunks_in_another_order() -> None:
    sizes, order = torch.tensor([2, 0, 3, 1]), torch.tensor([2, 0, 3, 1])
    x, probs = torch.randn(8, 3), torch.randn(8)
    target = permutation.make_chunk_sort_map(sizes, order, 8, 4)
    found, found_probs = permutation.sort_chunks_by_map(x, target, probs, 8, 3, True)
    source = torch.tensor([2, 3, 4, 0, 1, 5, 6, 7])  # the last two rows belong to no chunk
    assert torch.equal(found, x[source])
    assert found_probs is not None
    assert torch.equal(found_probs, probs[source])
    assert torch.equal(permutation.sort_chunks_by_map(found, target, None, 8, 3, False)[0], x)


# --- The optimizer ---


@pytest.mark.parametrize("mode", [0, 1])
def test_adam(mode: int) -> None:
    start = [torch.randn(5, 3), torch.randn(7)]
    expected = [x.double().requires_grad_() for x in start]
    kind = torch.optim.AdamW if mode else torch.optim.Adam
    reference = kind(expected, lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    masters = [x.clone() for x in start]
    weights = [x.bfloat16() for x in start]
    first, second = [torch.zeros_like(x) for x in start], [torch.zeros_like(x) for x in start]
    for step in range(1, 4):
        gradients = [torch.randn_like(x) for x in start]
        for x, g in zip(expected, gradients, strict=True):
            x.grad = g.double()
        reference.step()
        lists = [gradients, weights, first, second, masters]
        optimizer.multi_tensor_adam(1, torch.zeros(1), lists, 0.01, 0.8, 0.9, 1e-6, step, mode, 1, 0.1)
    for master, weight, wanted in zip(masters, weights, expected, strict=True):
        close(master, wanted.detach())
        assert torch.equal(weight, master.bfloat16())
    before = masters[0].clone()
    optimizer.multi_tensor_adam(1, torch.ones(1), lists, 0.01, 0.8, 0.9, 1e-6, 4, mode, 1, 0.1)
    assert torch.equal(masters[0], before)


def test_norm_and_scale_of_lists() -> None:
    lists = [torch.randn(4, 3), torch.randn(5).bfloat16()]
    norm, each = optimizer.multi_tensor_l2norm(1, torch.zeros(1), [lists], True)
    close(norm, torch.cat([x.double().flatten() for x in lists]).norm().reshape(1))
    close(each, torch.stack([x.double().norm() for x in lists]))
    flag = torch.zeros(1)
    optimizer.multi_tensor_scale_tensor(
        1, flag, [lists, [torch.empty(4, 3), targets := torch.empty(5)]], torch.tensor(0.5)
    )
    assert torch.equal(targets, lists[1].float() * 0.5)
    assert flag == 0
    optimizer.multi_tensor_scale(1, flag, [[torch.tensor([math.inf])], [torch.empty(1)]], 1.0)
    assert flag == 1
