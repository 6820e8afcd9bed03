"""The command `megatron-aspo`. One line names the missing packages if only the loss's are installed."""

from __future__ import annotations

import sys

from megatron_aspo.config.installed import check_installed
from megatron_aspo.errors import UserError


def main() -> int:
    """Check the installation, then run the command line, which imports pydantic."""
    try:
        check_installed()
    except UserError as error:
        print(f"megatron-aspo: {error}", file=sys.stderr)
        return 2
    from megatron_aspo.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
