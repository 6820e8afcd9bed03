#!/usr/bin/env bash
# Tests the fused head in older Megatron-Cores, each on the torch of .venv. `make test` tests the installed one.
#   scripts/test_megatron_versions.sh [VERSION...]
# By default all versions of tests/distributed/megatron_core.txt; the oldest also on two tensor-parallel ranks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly LOCK=tests/distributed/megatron_core.txt FOLDER=$PWD/.cache/megatron-core
mapfile -t known < <(grep -oP '^megatron-core==\K\S+' "$LOCK")
(($#)) || set -- "${known[@]}"

failed=()
for version in "$@"; do
  target=$FOLDER/$version
  if [[ ! -d $target ]]; then
    # The version's line of the lock, with the lines of its hashes.
    awk -v line="megatron-core==$version" '$1 == line { found = 1; print; next } !/^ / { found = 0 } found' "$LOCK" |
      scripts/bootstrap.sh uv pip install --quiet --no-config --python .venv/bin/python --target "$target.part" --no-deps \
        --require-hashes --requirement -
    mv "$target.part" "$target"
  fi
  ranks=(-k one_rank)
  [[ $version == "${known[0]}" ]] && ranks=()
  echo "Megatron-Core $version"
  # No time limit: CI runs this at the lowest priority.
  EXPECTED_MEGATRON_CORE=$version PYTHONPATH=$target CUDA_VISIBLE_DEVICES="" \
    .venv/bin/python -m pytest -n 0 -q --timeout 0 tests/distributed/test_megatron_versions.py "${ranks[@]}" || failed+=("$version")
done
((!${#failed[@]})) || { echo "the fused head failed with Megatron-Core ${failed[*]}" && exit 1; }
