"""Enumerations of the compiled module. Their values are those of the rehearsal's stand-in for it."""

from __future__ import annotations

from megatron_aspo.tools.rehearsal.engine.enums import ENUMS, torch_dtype

DType = ENUMS["DType"]
QkvLayout = ENUMS["NVTE_QKV_Layout"]
QkvFormat = ENUMS["NVTE_QKV_Format"]
BiasType = ENUMS["NVTE_Bias_Type"]
MaskType = ENUMS["NVTE_Mask_Type"]
SoftmaxType = ENUMS["NVTE_Softmax_Type"]
FusedAttnBackend = ENUMS["NVTE_Fused_Attn_Backend"]

__all__ = [
    "ENUMS",
    "BiasType",
    "DType",
    "FusedAttnBackend",
    "MaskType",
    "QkvFormat",
    "QkvLayout",
    "SoftmaxType",
    "torch_dtype",
]
