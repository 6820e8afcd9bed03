#!/usr/bin/env bash
# A dense model of about 32B parameters on 4 nodes of 8 GPUs.
#   sbatch [SBATCH FLAGS] slurm/aspo_32b.sh [RECIPE=NAME] [SETTING=VALUE ...] [section.field=value ...]
#   DRY_RUN=1 bash slurm/aspo_32b.sh     prints the commands; docs/slurm.md documents the settings
#SBATCH --job-name=aspo-32b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Seconds between the signal and the time limit, longer than a step and a checkpoint take.
#SBATCH --signal=B:USR1@600
#SBATCH --output=%x-%j.out
set -euo pipefail
RECIPE=${RECIPE:-qwen2_5_32b}
# Slurm runs a copy of this file from its spool folder, so $0 does not lead to the checkout.
ROOT=${ASPO_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
[[ -f $ROOT/slurm/body.sh ]] || { echo "$ROOT is not the checkout: submit from there, or export ASPO_ROOT" && exit 2; }
source "$ROOT/slurm/body.sh"
