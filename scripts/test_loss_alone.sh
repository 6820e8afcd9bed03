#!/usr/bin/env bash
# Tests the loss with torch as the only dependency. Builds the wheel, installs it without dependencies into an environment
# per Python, and runs the tests of the loss there.
#   scripts/test_loss_alone.sh [PYTHON:TORCH ...] [-- PYTEST ARGS...]
# By default the oldest installed Python from 3.10 on gets torch 2.6.0, the oldest supported version, and the newest gets the
# locked torch. uv downloads 3 GB of CUDA libraries for torch 2.6.0, none for the locked torch, whose libraries are in .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly OLDEST_TORCH=2.6.0 FOLDER=$PWD/.cache/loss-alone
locked() { grep -oP "^$1==\K[^ ;]+" requirements.txt; }
# --no-config: the project's uv settings override torch.
uv() { scripts/bootstrap.sh uv "$@" --no-config; }

interpreter() { # VERSION
  ls -d ~/.pyenv/versions/"$1".*/bin/python 2>/dev/null | sort -V | tail -n 1 | grep . ||
    uv python find --no-python-downloads "$1" 2>/dev/null
}

pairs=()
while (($#)) && [[ $1 != -- ]]; do pairs+=("$1") && shift; done
(($#)) && shift
if ((!${#pairs[@]})); then
  installed=()
  for version in 3.{10..19}; do
    interpreter "$version" >/dev/null && installed+=("$version")
  done
  pairs=("${installed[0]}:$OLDEST_TORCH" "${installed[-1]}:$(locked torch)")
fi
echo "the loss alone, on Python:torch ${pairs[*]}"

# Tests run outside the checkout, whose package would be imported instead of the wheel's.
rm -rf "$FOLDER/dist" "$FOLDER/tests"
mkdir -p "$FOLDER/tests/tests/distributed" # the path in pyproject.toml names tests/distributed
.venv/bin/python -m hatchling build -t wheel -d "$FOLDER/dist"
cp -r benchmarks pyproject.toml "$FOLDER/tests"
cp -r tests/conftest.py tests/data tests/unit "$FOLDER/tests/tests"

tests=(objectives logprobs fused_linear loss_refusals correction custom_objective megatron_head)
tests=("${tests[@]/#/tests/unit/test_}")
# Upper bounds only: some locked versions do not run on the oldest Python.
tools=("pytest<=$(locked pytest)" "pytest-timeout<=$(locked pytest-timeout)" "hypothesis<=$(locked hypothesis)")
failed=()
for pair in "${pairs[@]}"; do
  version=${pair%%:*} torch=${pair#*:}
  venv=$FOLDER/$version-$torch python=$FOLDER/$version-$torch/bin/python
  install() { uv pip install --quiet --python "$python" "$@"; }
  uv venv --quiet --clear --python "$(interpreter "$version")" "$venv"
  install "torch==$torch" "${tools[@]}"
  install --no-deps "$FOLDER"/dist/*.whl
  (
    cd "$FOLDER/tests"
    "$python" -c 'import importlib.util, megatron_aspo, platform, torch
print("Python", platform.python_version(), "torch", torch.__version__, "and", megatron_aspo.__file__)
assert not any(importlib.util.find_spec(name) for name in ("numpy", "megatron", "omegaconf", "pydantic", "rich"))' &&
      # Deselected: torch 2.6 calls no hook of a weight whose gradient is None. In a model the embedding's gradient does.
      "$python" -m pytest "${tests[@]/%/.py}" -k "not is_told_that_the_gradient_is_in_main_grad" "$@"
  ) || failed+=("$pair")
  # Triton's interpreter needs numpy; an old Triton needs setuptools. One test requires the compiler of a newer Triton.
  install "numpy<=$(locked numpy)" setuptools
  (cd "$FOLDER/tests" && "$python" -m pytest tests/unit/test_kernels.py -k "not compiled_for_a_gpu" "$@") || failed+=("$pair kernels")
done
((!${#failed[@]})) || { echo "the loss alone: failed on ${failed[*]}" && exit 1; }
