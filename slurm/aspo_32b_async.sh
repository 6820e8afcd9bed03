#!/usr/bin/env bash
# A dense model of about 32B parameters on 8 nodes of 8 GPUs, of which 4 only sample.
#   sbatch [SBATCH FLAGS] slurm/aspo_32b_async.sh [RECIPE=NAME] [SETTING=VALUE ...] [section.field=value ...]
#   DRY_RUN=1 bash slurm/aspo_32b_async.sh     prints the commands; docs/slurm.md documents the settings
#SBATCH --job-name=aspo-32b-async
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Seconds between the signal and the time limit, longer than two steps and a checkpoint take: a batch is sampled ahead.
#SBATCH --signal=B:USR1@900
#SBATCH --output=%x-%j.out
set -euo pipefail
RECIPE=${RECIPE:-qwen3_32b_async}
# Slurm runs a copy of this file from its spool folder, so $0 does not lead to the checkout.
ROOT=${ASPO_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
[[ -f $ROOT/slurm/body.sh ]] || { echo "$ROOT is not the checkout: submit from there, or export ASPO_ROOT" && exit 2; }
source "$ROOT/slurm/body.sh"
