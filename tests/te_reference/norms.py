"""RMSNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from te_reference.enums import torch_dtype
from te_reference.quantize import quantize_into
from te_reference.registry import kernel
from te_reference.rounding import as_matrix
from te_reference.tensors import empty_quantized, is_delayed


def _gamma(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.float() + 1 if zero_centered else weight.float()


@kernel
def rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Any]:
    """[..., h], [h] -> [y [..., h], None, 1 / rms [n] in float32].

    y is computed in float32 and rounded once to `otype`. With delayed scaling the kernel itself quantizes, from
    float32; other quantizers get the rounded output.

    Source: `rmsnorm_fwd` in csrc/extensions/normalization.cpp, common/normalization/rmsnorm.
    """
    x = as_matrix(input).float()
    inverse = torch.rsqrt(x.square().mean(-1) + eps)
    y = (x * inverse[:, None] * _gamma(weight, zero_centered_gamma)).reshape(input.shape)
    kind = torch_dtype(otype)
    if not is_delayed(quantizer):
        y = y.to(kind)
    if quantizer is None:
        return [y.to(kind) if ln_out is None else ln_out.copy_(y), None, inverse]
    if ln_out is None:
        ln_out = empty_quantized(quantizer, input.shape, kind, input.device)
    quantize_into(y, quantizer, ln_out)
    return [ln_out, None, inverse]


@kernel
def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> list[Tensor]:
    """Gradients [dx [..., h], dγ [h]], in float32 and rounded once to the types of x and γ.

    Source: `rmsnorm_bwd` in csrc/extensions/normalization.cpp.
    """
    inverse = rsigma.reshape(-1, 1)
    normed = as_matrix(x).float() * inverse
    dy = as_matrix(dz).float()
    scaled = dy * _gamma(gamma, zero_centered_gamma)
    dx = inverse * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return [dx.to(x.dtype).reshape(x.shape), (dy * normed).sum(0).to(gamma.dtype)]
