"""Transformer Engine 2.20.2 without a GPU: its own Python code on kernels written in torch operations.

`install.install()` puts the functions of this package in the place of the compiled module `transformer_engine_torch`.
Transformer Engine's Python is unchanged: modules, autograd functions, quantizers, quantized tensors, recipes, FP8 state
and ring attention are real.

The functions follow the C++ of `transformer_engine_torch` (folder `csrc/` of its source distribution: shapes, types,
buffers that are made and read) and the kernels' headers beside it (scales, rounding). Matrix products are computed in
float32 and rounded once. Only functions that this project's models call are here; any other raises
NotImplementedError with its name.

The package can be imported without Transformer Engine; functions of quantized tensors import its classes when they are
called.
"""
