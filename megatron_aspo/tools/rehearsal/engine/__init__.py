"""Transformer Engine's own Python with kernels that compute nothing."""

from megatron_aspo.tools.rehearsal.engine import attention, kernels, quantize
from megatron_aspo.tools.rehearsal.engine.load import install
from megatron_aspo.tools.rehearsal.engine.registry import extension

__all__ = ["attention", "extension", "install", "kernels", "quantize"]
