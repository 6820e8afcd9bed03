"""Enumerations of `transformer_engine_torch` 2.20 (transformer_engine/pytorch/csrc/extensions/pybind.cpp)."""

from __future__ import annotations

import enum
from typing import Any

import torch

TORCH_DTYPES = {
    0: torch.uint8,
    1: torch.int16,
    2: torch.int32,
    3: torch.int64,
    4: torch.float32,
    5: torch.float16,
    6: torch.bfloat16,
    7: torch.float8_e4m3fn,
    8: torch.float8_e5m2,
}


def torch_dtype(dtype: Any) -> torch.dtype:
    return dtype if isinstance(dtype, torch.dtype) else TORCH_DTYPES[int(dtype)]


def _enum(name: str, members: str, start: int = 0, prefix: str = "", **more: int) -> Any:
    return enum.IntEnum(name, {prefix + member: start + i for i, member in enumerate(members.split())} | more)


ENUMS: dict[str, Any] = {
    "DType": enum.IntEnum(
        "DType",
        {
            "kByte": 0,
            "kInt32": 2,
            "kFloat32": 4,
            "kFloat16": 5,
            "kBFloat16": 6,
            "kFloat8E4M3": 7,
            "kFloat8E5M2": 8,
            "kFloat4E2M1": 10,
        },
    ),
    "FP8FwdTensors": _enum(
        "FP8FwdTensors",
        "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT GEMM3_INPUT GEMM3_WEIGHT "
        "GEMM3_OUTPUT",
    ),
    "FP8BwdTensors": _enum(
        "FP8BwdTensors", "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3"
    ),
    "NVTE_QKV_Layout": _enum(
        "NVTE_QKV_Layout",
        "SB3HD SBH3D SBHD_SB2HD SBHD_SBH2D SBHD_SBHD_SBHD BS3HD BSH3D BSHD_BS2HD BSHD_BSH2D BSHD_BSHD_BSHD T3HD TH3D "
        "THD_T2HD THD_TH2D THD_THD_THD SBHD_BSHD_BSHD BSHD_SBHD_SBHD THD_BSHD_BSHD THD_SBHD_SBHD "
        "Paged_KV_BSHD_BSHD_BSHD Paged_KV_BSHD_SBHD_SBHD Paged_KV_SBHD_BSHD_BSHD Paged_KV_SBHD_SBHD_SBHD "
        "Paged_KV_THD_BSHD_BSHD Paged_KV_THD_SBHD_SBHD BHSD_BHSD_BHSD QKV_Layout_NOT_SET",
        prefix="NVTE_",
    ),
    "NVTE_QKV_Format": _enum(
        "NVTE_QKV_Format",
        "SBHD BSHD THD BSHD_2SBHD SBHD_2BSHD THD_2BSHD THD_2SBHD BHSD QKV_Format_NOT_SET",
        prefix="NVTE_",
    ),
    "NVTE_Bias_Type": _enum("NVTE_Bias_Type", "NO_BIAS PRE_SCALE_BIAS POST_SCALE_BIAS ALIBI", prefix="NVTE_"),
    "NVTE_Mask_Type": _enum(
        "NVTE_Mask_Type",
        "NO_MASK PADDING_MASK CAUSAL_MASK PADDING_CAUSAL_MASK CAUSAL_BOTTOM_RIGHT_MASK "
        "PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
        prefix="NVTE_",
    ),
    "NVTE_Softmax_Type": _enum(
        "NVTE_Softmax_Type", "VANILLA_SOFTMAX OFF_BY_ONE_SOFTMAX LEARNABLE_SOFTMAX", prefix="NVTE_"
    ),
    "NVTE_Fused_Attn_Backend": _enum(
        "NVTE_Fused_Attn_Backend", "NVTE_F16_arbitrary_seqlen NVTE_FP8", start=1, NVTE_No_Backend=-1
    ),
    "NVTEScalingMode": _enum(
        "NVTEScalingMode",
        "NVTE_DELAYED_TENSOR_SCALING NVTE_MXFP8_1D_SCALING NVTE_BLOCK_SCALING_1D NVTE_BLOCK_SCALING_2D "
        "NVTE_NVFP4_1D_SCALING",
        NVTE_INVALID_SCALING=100,
    ),
    "Float8BlockScaleTensorFormat": _enum("Float8BlockScaleTensorFormat", "GEMM_READY COMPACT INVALID"),
    "NVTERoutingMapFormat": _enum("NVTERoutingMapFormat", "BYTEMAP BITMAP_U8"),
    "NVTEQBHistogramMode": _enum("NVTEQBHistogramMode", "TWO_KERNEL FUSED_ATOMIC"),
    "CommOverlapType": _enum("CommOverlapType", "RS AG"),
    "CommOverlapAlgo": _enum(
        "CommOverlapAlgo",
        "BULK_OVERLAP_AG BULK_OVERLAP_RS SPLIT_PIPELINED_AG_P2P SPLIT_PIPELINED_RS SPLIT_PIPELINED_RS_P2P "
        "ATOMIC_GEMM_RS ATOMIC_GEMM_AG_P2P ATOMIC_GEMM_RS_P2P EXTERNAL_BULK_OVERLAP_AG",
    ),
}
