"""A checkpoint as a Hugging Face folder. `torchrun --nproc-per-node N -m megatron_aspo.export CONFIG.yaml FOLDER`"""

from __future__ import annotations

import sys

import torch.distributed as dist

from megatron_aspo.config import colocated
from megatron_aspo.distributed import distributed
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.run_folder import find_checkpoint
from megatron_aspo.tokenizer import load_tokenizer


def main(argv: list[str] | None = None) -> int:
    """One rank of an export."""
    from megatron_aspo import cli

    def run() -> int:
        parser = cli.Parser(prog="megatron_aspo.export")
        cli.add_export_arguments(parser)
        arguments = cli.parse(parser, argv)
        config = colocated(cli.parse_run_config(arguments))
        cli.check_export(config, arguments.folder)
        with distributed(config):
            path = find_checkpoint(config, arguments.checkpoint)
            policy = Policy(config, load_tokenizer(config).vocab_size)
            from megatron_aspo.policy import hf  # has been imported with the model

            checkpoint.load_weights(path, policy)
            hf.save_folder(policy, arguments.folder)
            if dist.get_rank() == 0:
                print(f"{path} -> {arguments.folder}")
        return 0

    return cli.exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
