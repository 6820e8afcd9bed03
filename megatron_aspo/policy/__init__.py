"""The policy: model, optimizer, checkpoints. The only room of the loop that reads Megatron's parallel state."""

import logging
import warnings

from megatron_aspo.policy.cpu.cuda import import_megatron

# Megatron-Core warns at import, and again at every step, of each optional package that is missing and of its own
# deprecated calls. Errors still come through.
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
