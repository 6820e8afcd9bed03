"""`megatron-aspo export` on one rank: `torchrun ... -m megatron_aspo.commands.export CONFIG.yaml FOLDER`"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch.distributed as dist

from megatron_aspo.commands.arguments import run_rank
from megatron_aspo.config.run import RunConfig
from megatron_aspo.data.tokenizer import load_tokenizer
from megatron_aspo.journal.folder import find_checkpoint
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.hf.folder import VISION
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.ranks.process_group import distributed


def export(arguments: argparse.Namespace, config: RunConfig) -> int:
    """Write a checkpoint as the Hugging Face folder `arguments.folder`."""
    with distributed(config):
        path = find_checkpoint(config, arguments.checkpoint)
        policy = Policy(config, load_tokenizer(config.model, config.data).vocab_size)
        from megatron_aspo.policy.hf import weights as hf  # imported with the model already

        checkpoint.load_weights(path, policy)
        kept = hf.save_folder(arguments.folder, config.model, policy.whole_chunks(), policy.vocab_size)
        if dist.get_rank() == 0:
            print(f"{path} -> {arguments.folder}")
        vision = sum(name.startswith(VISION) for name in kept)
        for part, count, note in (("MTP", len(kept) - vision, "stale, not trained"), ("vision", vision, "untouched")):
            if count:
                print(f"{count} tensors of {part} are those of model.hf_path={config.model.hf_path}: {note}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_rank("export", export, argv)


if __name__ == "__main__":
    sys.exit(main())
