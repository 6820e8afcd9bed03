"""megatron_aspo: Asymmetric Importance Sampling Policy Optimization on Megatron-Core."""

__version__ = "0.1.0"
