"""Transformer Engine's Python on a stand-in for its compiled part, the module `transformer_engine_torch`.

No file of Transformer Engine is edited. Everything here holds for version 2.20.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import os
import sys
import types
from typing import Any

import torch

from megatron_aspo.errors import UserError
from megatron_aspo.tools.rehearsal.costs import bytes_touched
from megatron_aspo.tools.rehearsal.engine.registry import state
from megatron_aspo.tools.rehearsal.fake_gpu import FakeTensor
from megatron_aspo.tools.rehearsal.shadows import tensors_in

EXTENSION = "transformer_engine_torch"


def install(extension: types.ModuleType) -> None:
    """Make `extension` the compiled part, and each function that torch.compile takes one kernel. To be called before
    Megatron-Core is imported, which imports the engine.

    Raises:
        UserError: Transformer Engine's Python is not installed.
    """
    torch.compile = lambda model=None, **_: fuse if model is None else fuse(model)  # type: ignore[assignment]
    import_engine(extension, compiles=True)
    import megatron.core.jit as mcore_jit

    mcore_jit.jit_fuser = fuse
    attention: Any = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.utils")
    attention.get_attention_backend = _as_of_tensors(attention.get_attention_backend)
    distributed: Any = importlib.import_module("transformer_engine.pytorch.distributed")
    distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda *_, **__: None


def fuse(function: Any) -> Any:
    """`function` as one kernel on the current tape."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        tape = state.tape_now()
        if tape is None:
            return function(*args, **kwargs)
        with tape.one_kernel() as moved:
            out = function(*args, **kwargs)
            moved(sum(map(bytes_touched, tensors_in((args, kwargs, out)))))
        return out

    return call


def import_engine(extension: types.ModuleType, compiles: bool = False) -> None:
    """Import Transformer Engine with `extension` as its compiled part, without libraries and without ONNX.

    Args:
        compiles: leave it to torch.compile to fuse functions.

    Raises:
        UserError: Transformer Engine's Python is not installed.
    """
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None:
        raise UserError("Transformer Engine's Python is not installed; install it: make rehearsal")
    os.environ["NVTE_TORCH_COMPILE"] = str(int(compiles))
    sys.modules[EXTENSION] = extension
    sys.modules["transformer_engine.pytorch.onnx_extensions"] = _NothingForOnnx("onnx_extensions")
    _import_without_libraries(spec)


class _NothingForOnnx(types.ModuleType):
    """Takes the place of the engine's exporter to ONNX, whose packages are not installed."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _import_without_libraries(spec: Any) -> None:
    """`transformer_engine.common` loads shared libraries, except while the project builds, and then says nothing."""
    bare = types.ModuleType("transformer_engine")
    bare.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["transformer_engine"] = bare
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    try:
        common: Any = importlib.import_module("transformer_engine.common")
    finally:
        del sys.modules["transformer_engine"], os.environ["NVTE_PROJECT_BUILDING"]

    def load_framework_extension(framework: str) -> None:
        if framework != "torch":
            raise ImportError(framework)

    common.load_framework_extension = load_framework_extension
    engine: Any = importlib.import_module("transformer_engine")
    engine.common = common


def _as_of_tensors(get_attention_backend: Any) -> Any:
    """The engine chooses an attention kernel by the tensors' exact type, and knows no fake ones."""

    @functools.wraps(get_attention_backend)
    def choose(attention_params: Any = None) -> Any:
        if attention_params is not None and attention_params.qkv_type is FakeTensor:
            attention_params = dataclasses.replace(attention_params, qkv_type=torch.Tensor)
        return get_attention_backend(attention_params)

    return choose
