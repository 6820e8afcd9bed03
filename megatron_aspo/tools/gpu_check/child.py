"""The process of a check, or of one of its ranks: `python -m megatron_aspo.tools.gpu_check.child TARGET LAB RESULT`"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from megatron_aspo.config.import_path import import_object
from megatron_aspo.errors import UserError
from megatron_aspo.tools.gpu_check.records import Lab


def main() -> int:
    """Run the check and write its numbers."""
    target, lab, result = sys.argv[1:]
    try:
        numbers = import_object(target, "lab")(Lab(**json.loads(lab)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    if os.environ.get("RANK", "0") == "0":
        Path(result).write_text(json.dumps(numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
