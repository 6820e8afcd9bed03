"""Builds build/gpu-check.zip: `gpu-check` for a CUDA machine that has only torch, Triton and transformers.

    unzip gpu-check.zip && python3 gpu-check

The folder holds this package, Megatron-Core and the pure or binary packages for Python 3.12 that they import, as they
are installed here (`make install` locks them). Nothing is downloaded, here or there.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = (
    *("megatron-core", "psutil", "omegaconf", "antlr4-python3-runtime", "pydantic", "pydantic-core", "annotated-types"),
    *("typing-inspection", "typing-extensions"),
)
"""Imported by `megatron_aspo.policy` and `megatron_aspo.config`, besides the dependencies of torch and transformers."""

START = '''"""`python3 gpu-check [--only 2,3] [--cpu]`: needs torch >= 2.11, Triton, transformers and Python 3.12."""

import os
import sys
from pathlib import Path

if sys.version_info[:2] != (3, 12):
    print("gpu-check: its packages are for Python 3.12; start it with that", file=sys.stderr)
    sys.exit(2)
folder = str(Path(__file__).resolve().parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
arguments = ("-m", "megatron_aspo.tools.gpu_check.command", "--bare", "--out", "gpu-check-results", *sys.argv[1:])
os.execv(sys.executable, (sys.executable, *arguments))
'''


def main(build: Path = ROOT / "build") -> None:
    folder = build / "gpu-check"
    shutil.rmtree(folder, ignore_errors=True)
    for package in PACKAGES:
        distribution = importlib.metadata.distribution(package)
        for file in distribution.files or []:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(str(distribution.locate_file(file)), folder / file)
    shutil.copytree(ROOT / "megatron_aspo", folder / "megatron_aspo", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "__main__.py").write_text(START)
    print(shutil.make_archive(str(folder), "zip", build, "gpu-check"))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
