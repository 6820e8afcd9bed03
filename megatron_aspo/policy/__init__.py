"""The policy: model, optimizer, checkpoints. The only room that reads Megatron's parallel state."""

import logging
import warnings

from megatron_aspo.policy.cpu import import_megatron

# Megatron-Core tells at import, and then at every step, of each optional package that is not there and of its own
# deprecated calls. That is for its developers; errors still come through.
warnings.filterwarnings("ignore", module=r"megatron\.core")
for _noise in (
    "`torch.distributed.",
    "torch.distributed is disabled",
    "The .grad attribute of a Tensor",
    "The argument order of load",
    "Please use DTensor",
    "Apex is not installed",
):
    warnings.filterwarnings("ignore", message=_noise)
for _name in ("megatron.core", "torch.utils.cpp_extension"):
    logging.getLogger(_name).setLevel(logging.ERROR)

import_megatron()
