"""`megatron-aspo gpu-check`: what a machine with GPUs is tested for before its first run.

`runner` starts each check of the modules `checks_*` in a process of its own and judges the numbers that it returns by
the bounds of its record (`records`).
"""
