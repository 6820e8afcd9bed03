# shellcheck shell=bash
# Common body of the job scripts: checks the nodes, trains, and continues from the last checkpoint until the run is
# complete; or runs another command on the ranks once. docs/slurm.md documents settings and restarts.
#
# Arguments that start with a capital letter are settings of the job; they may also be environment variables. Arguments
# that start with a small letter are settings of the recipe, such as loss.clip_high=0.28.
# Exit codes: 0 trained to the end, 2 configuration error, 75 stopped before the end (submit again), else a failure.

JOB=${SLURM_JOB_ID:-0} ATTEMPT=${SLURM_RESTART_COUNT:-0}
say() { printf '%(%FT%T%z)T [%s] %s\n' -1 "$JOB-$ATTEMPT" "$*"; }
end() { # EXIT_CODE MESSAGE
  say "$2"
  exit "$1"
}

# --- Arguments.
KNOWN="RECIPE COMMAND CONTAINER CONTAINER_MOUNTS PYTHON LAUNCHER MAX_RESTARTS MAX_CRASHES NODE_CHECK SLURM_WAIT OFFLINE DRY_RUN"
sbatch_line() { sed -n "s/^#SBATCH --$1=//p" "$0"; } # default for a dry run, which has no Slurm variables
JOB_NAME=${SLURM_JOB_NAME:-$(sbatch_line job-name)}
ARGS=() NAME='' OUTPUT_DIR=
for word in "$@"; do # first, because options are refused without it
  [[ $word != COMMAND=* ]] || COMMAND=${word#*=}
done
[[ $JOB_NAME == "$(sbatch_line job-name)" ]] || NAME=$JOB_NAME
for word in "$@"; do
  case $word in
    -*)
      [[ ${COMMAND:-train} != train ]] ||
        end 2 "$word: sbatch's flags go before the script's name, and training has no options"
      ARGS+=("$word")
      ;;
    [[:upper:]]*=*)
      [[ " $KNOWN " == *" ${word%%=*} "* ]] ||
        end 2 "$word: the settings of a job are $KNOWN; other variables are exported before sbatch"
      export "${word?}"
      ;;
    *)
      [[ $word != name=* ]] || NAME=${word#*=}
      [[ $word != output_dir=* ]] || OUTPUT_DIR=${word#*=}
      ARGS+=("$word")
      ;;
  esac
done
cd "$ROOT" || exit
if [[ ! -f $RECIPE ]]; then
  there=(examples/*.yaml) && there=("${there[@]#examples/}")
  [[ -f examples/$RECIPE.yaml ]] || end 2 "RECIPE=$RECIPE is neither a file nor one of ${there[*]%.yaml}"
  RECIPE=examples/$RECIPE.yaml
fi
# Each recipe has its own run folder, in which the commands that take the recipe find it.
of_recipe() { # FIELD: a word in YAML, quoted or not
  sed -n "s/^$1: *//p" "$RECIPE" | sed -E "s/^\"([^\"]*)\".*/\1/; t; s/^'([^']*)'.*/\1/; t; s/(^| +)#.*//; s/ *$//"
}
[[ -n $NAME ]] || NAME=$(of_recipe name)
[[ -n $NAME ]] || NAME=$(basename "$RECIPE" .yaml)
[[ -n $OUTPUT_DIR ]] || OUTPUT_DIR=$(of_recipe output_dir)
OUTPUT_DIR=${OUTPUT_DIR:-runs}
[[ $NAME != *[\$\\]* ]] || end 2 "$RECIPE has name: $NAME, which only Python resolves; give name=NAME after the script"
[[ $OUTPUT_DIR != *[\$\\]* ]] ||
  end 2 "$RECIPE has output_dir: $OUTPUT_DIR, which only Python resolves; give output_dir=FOLDER after the script"
RUN_DIR=$(realpath -m "$OUTPUT_DIR/$NAME")
LOG_DIR=$RUN_DIR/logs/$JOB-$ATTEMPT
MAX_RESTARTS=${MAX_RESTARTS:-20} MAX_CRASHES=${MAX_CRASHES:-3} SLURM_WAIT=${SLURM_WAIT:-120} CONTAINER=${CONTAINER:-}
for name in MAX_RESTARTS MAX_CRASHES SLURM_WAIT; do
  [[ ${!name} =~ ^(0|[1-9][0-9]*)$ ]] || end 2 "$name=${!name} is not a whole number"
done
NODES=${SLURM_NNODES:-$(sbatch_line nodes)} TASKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-$(sbatch_line ntasks-per-node)}
RANKS=$((NODES * TASKS_PER_NODE))
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python
  [[ -n $CONTAINER || ! -x $ROOT/.venv/bin/python ]] || PYTHON=$ROOT/.venv/bin/python
fi

# --- Environment of the ranks. Variables that are already set win. NCCL_IB_*, *_SOCKET_IFNAME and others are passed on.
# The node check writes variables that depend on recipe and GPU (OMP_NUM_THREADS, CUDA_DEVICE_MAX_CONNECTIONS) to $LOG_DIR/rank.env.
# Some tasks of reasoning-gym draw from sets, whose order follows the hash seed.
export PYTHONHASHSEED=${PYTHONHASHSEED:-0}
export PYTHONUNBUFFERED=1 NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# Flight recorder: writes the last collectives of every rank to a file after a hang.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$LOG_DIR/flight-recorder-rank}
export VLLM_CACHE_ROOT=${VLLM_CACHE_ROOT:-$RUN_DIR/cache/vllm} # compiled code, for restarts and later jobs
export HF_HOME=${HF_HOME:-$ROOT/.cache/huggingface} # on a shared file system: one download for all nodes
[[ ${OFFLINE:-0} == 0 ]] || export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
# An exclusive job has all cores of its nodes, but by default Slurm binds each task to a single core.
cores=$((${SLURM_CPUS_ON_NODE:-0} / TASKS_PER_NODE))
((cores == 0)) || export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$cores}

# --- Commands. `exec`: signals reach only the direct child of the step. USR1 is ignored until Python handles it.
# --wait instead of --kill-on-bad-exit: after one rank ends, others may still save or log the reason.
STEP=(srun --export=ALL --nodes="$NODES" --open-mode=append --wait="$SLURM_WAIT")
if [[ -n $CONTAINER ]]; then
  mounts=$ROOT:$ROOT,$RUN_DIR:$RUN_DIR,$HF_HOME:$HF_HOME${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
  STEP+=(--container-image="$CONTAINER" --container-mounts="$mounts" --container-workdir="$ROOT"
    --no-container-mount-home)
fi
SETTINGS=("$RECIPE" "name=$NAME" "output_dir=$OUTPUT_DIR")
case ${COMMAND:=train} in
  train)
    SETTINGS+=(checkpoint.resume=auto "${ARGS[@]}")
    RUN=(-m megatron_aspo.commands.train "${SETTINGS[@]}")
    ;;
  eval | export | check-rollout)
    module=${COMMAND/eval/evaluate} own=()
    for word in "${ARGS[@]}"; do # the node check takes settings alone, and they come last
      if [[ $word =~ ^(name|seed|output_dir|[a-z_]+\.[a-z0-9_.]+)= ]]; then SETTINGS+=("$word"); else own+=("$word"); fi
    done
    RUN=(-m "megatron_aspo.commands.${module/-/_}" "$RECIPE" "${own[@]}" "${SETTINGS[@]:1}")
    ;;
  *) end 2 "COMMAND=$COMMAND is none of train, eval, export, check-rollout" ;;
esac
# Expanded on the nodes and in the container, where the TMPDIR of the submitting machine may not exist. These caches are
# local to the node because ranks race in shared folders; vLLM gives each rank a folder of its own.
# shellcheck disable=SC2016
node='trap "" USR1
[[ -d ${TMPDIR:-} && -w $TMPDIR ]] || unset TMPDIR
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$UID-$SLURM_JOB_ID}
export FLASHINFER_WORKSPACE_BASE=${FLASHINFER_WORKSPACE_BASE:-${TMPDIR:-/tmp}/flashinfer-$UID}'
# shellcheck disable=SC2016
rank=$node'
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES)) NODE_RANK=$SLURM_NODEID
exec "$@"'
# shellcheck disable=SC2016 # USR1 bypasses torchrun, which kills its ranks 30 s after a signal
agent=$node'
export PET_NODE_RANK=$SLURM_NODEID PET_MASTER_ADDR=$MASTER_ADDR PET_MASTER_PORT=$MASTER_PORT
"$@" & agent=$!
trap "kill \$agent" TERM
trap "kill -USR1 \$(</proc/$agent/task/$agent/children)" USR1
while :; do wait $agent; code=$?; kill -0 $agent 2>/dev/null || exit $code; done'
# --wait=0: the first node names a node whose task has ended, after its patience.
CHECK=("${STEP[@]}" --ntasks="$NODES" --ntasks-per-node=1 --time=40 --wait=0 --output="$LOG_DIR/check-node%n.log"
  bash -c "$rank" rank "$PYTHON" -m megatron_aspo.commands.node_check --ranks "$RANKS" --log-dir "$LOG_DIR" "${SETTINGS[@]}")
case ${LAUNCHER:=srun} in
  srun)
    # block: a node's first ranks, and GPUs, belong to its first socket. srun would alternate between sockets.
    START=("${STEP[@]}" --ntasks="$RANKS" --ntasks-per-node="$TASKS_PER_NODE" --output="$LOG_DIR/node%n-rank%t.log"
      --distribution="${SLURM_DISTRIBUTION:-block:block}"
      bash -c "$rank" rank "$PYTHON" "${RUN[@]}")
    ;;
  torchrun)
    [[ -z ${SRUN_CPUS_PER_TASK:-} ]] || SRUN_CPUS_PER_TASK=$((SRUN_CPUS_PER_TASK * TASKS_PER_NODE)) # one task has all ranks
    START=("${STEP[@]}" --ntasks="$NODES" --ntasks-per-node=1 --output="$LOG_DIR/node%n.log"
      bash -c "$agent" agent "$PYTHON" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$TASKS_PER_NODE"
      "${RUN[@]}")
    ;;
  *) end 2 "LAUNCHER=$LAUNCHER is neither srun nor torchrun" ;;
esac

if [[ ${DRY_RUN:-0} != 0 ]]; then
  printf '%q ' "${CHECK[@]}" && echo
  printf '%q ' "${START[@]}" && echo
  exit
fi
[[ -n ${SLURM_JOB_ID:-} ]] || end 2 "not inside a Slurm job: submit with sbatch, or set DRY_RUN=1"

# --- Stopping and requeueing.
newest_checkpoint() { # ignores those set aside (step_000020.abandoned-1) and unfinished ones
  (shopt -s nullglob && printf '%s\n' "$RUN_DIR"/checkpoints/step_* | grep -E '/step_[0-9]+$' | tail -n 1) || true
}
saved_since() { # FILE
  local newest
  newest=$(newest_checkpoint)
  [[ -n $newest && -s $newest/meta.json && $newest/meta.json -nt $1 ]]
}

persist() { # COMMAND...: tries three times, because a busy controller answers late
  "$@" || { sleep 3 && "$@"; } || { sleep 3 && "$@"; }
}

job_field() { # NAME: as the controller shows it; empty if it has none or does not answer
  persist scontrol --oneliner show job "$JOB" | sed -n "s/.* $1=\([^ (]*\).*/\1/p" || true
}

requeue() { # REASON [NODES TO EXCLUDE]
  ((ATTEMPT < MAX_RESTARTS)) ||
    end 75 "$1; not requeued: MAX_RESTARTS=$MAX_RESTARTS is reached; submit the job again"
  trap '' TERM # requeueing sends TERM to this script
  if [[ -z ${2:-} ]]; then
    persist scontrol requeue "$JOB" || end 75 "$1; Slurm cannot requeue the job: submit it again, or let the next job of its chain continue"
  else
    local excluded
    excluded=$(job_field ExcNodeList)
    persist scontrol requeuehold "$JOB" || end 75 "$1; submit it again with --exclude=$2"
    until scontrol update "JobId=$JOB" "ExcNodeList=$2${excluded:+,$excluded}" 2>/dev/null; do sleep 1; done
    until scontrol release "$JOB"; do sleep 1; done
  fi
  end 75 "$1; requeued"
}

stop=
on_usr1() { # repeats the signal, because ranks that are still starting ignore it
  [[ $COMMAND == train ]] || { say "stop signal received; $COMMAND has nothing to save and goes on" && return 0; }
  say "stop signal received; the ranks finish their step and save"
  stop=USR1
  [[ -z ${nag:-} ]] || return 0
  while kill -0 $$; do scancel --signal=USR1 "$JOB" || true && sleep 5; done 2>/dev/null &
  nag=$!
  local limit
  limit=$(job_field EndTime)
  [[ $limit != [0-9]* ]] || { late "$(date -d "$limit" +%s)" & last_call=$!; }
}
late() { # END: Slurm does not requeue a job that reaches its time limit
  while (($(date +%s) < $1 - 30)); do sleep 5; done
  requeue "the step outlasts the time limit"
}
trap on_usr1 USR1
trap 'stop=TERM' TERM # Slurm ends the job: it has signalled the ranks and decided about a requeue
trap 'kill ${nag:-} ${last_call:-} 2>/dev/null || true' EXIT
trap 'say "line $LINENO of body.sh failed"' ERR

heed_stop() { # before the ranks start
  [[ $stop != TERM ]] || end 75 "ended by Slurm"
  [[ $stop != USR1 ]] || requeue "stopped before training began"
}

in_step() { # COMMAND...: returns its exit code; traps run while it waits
  "$@" &
  local pid=$! rc
  while :; do
    rc=0
    wait "$pid" || rc=$?
    kill -0 "$pid" 2>/dev/null || return "$rc"
  done
}

# --- The job.
mkdir -p "$LOG_DIR" "$HF_HOME"
((ATTEMPT <= MAX_RESTARTS)) || end 75 "MAX_RESTARTS=$MAX_RESTARTS is exceeded; submit the job again"
if [[ $COMMAND == train ]]; then
  owner=$(cat "$RUN_DIR/logs/job" 2>/dev/null || echo "$JOB")
  busy() { [[ $owner != "$JOB" && -n $(squeue --noheader --states="$1" --jobs="$owner" 2>/dev/null) ]]; }
  # The next job of a chain may start while nodes of the last one are still being cleaned.
  for ((round = 0; round < 120; round++)); do
    busy CG || break
    ((round)) || say "waiting at most 10 minutes until the nodes of job $owner are cleaned"
    sleep 5
    heed_stop
  done
  ! busy R,S,CG || end 2 "job $owner writes to $RUN_DIR; wait for it (--dependency=singleton), or set another --job-name"
  echo "$JOB" >"$RUN_DIR/logs/job"
fi
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Below 32768: Linux uses the ports above for outgoing connections, so they may be taken.
MASTER_ADDR=$(persist scontrol --oneliner show node "${hosts[0]}" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + JOB % 10000))} NODE_NAMES="${hosts[*]}"
if [[ -n $CONTAINER ]]; then
  if [[ -f $CONTAINER ]]; then sha256sum "$CONTAINER"; else echo "$CONTAINER"; fi >"$LOG_DIR/container.txt" &
  # The node check also records this, but a container may have no git.
  { git rev-parse HEAD && git diff HEAD; } >"$LOG_DIR/git-outside.txt" 2>&1 || true
fi
say "$COMMAND $RECIPE on ${hosts[*]}; logs in $LOG_DIR"

while :; do
  rm -f "$LOG_DIR/bad-nodes"
  rc=0
  in_step "${CHECK[@]}" || rc=$?
  heed_stop
  ((rc != 2)) || end 2 "$(tail -n 1 "$LOG_DIR/check-node0.log")"
  if [[ -s $LOG_DIR/bad-nodes ]]; then
    say "bad nodes:" && sed 's/^/  /' "$LOG_DIR/bad-nodes"
    (($(wc -l <"$LOG_DIR/bad-nodes") < NODES)) || end 1 "no node passes the check; the cause is common to all of them"
    requeue "the node check failed" "$(cut -d ' ' -f 1 "$LOG_DIR/bad-nodes" | paste -s -d ,)"
  fi
  if ((rc == 0)); then
    while read -r line; do [[ -v ${line%%=*} ]] || export "${line?}"; done <"$LOG_DIR/rank.env"
    if [[ $COMMAND != train ]]; then
      in_step "${START[@]}" || rc=$?
      cat "$LOG_DIR"/node0-rank0.log "$LOG_DIR"/node0.log 2>/dev/null || true
      end "$rc" "$COMMAND ended with code $rc"
    fi
    rm -f "$RUN_DIR/interrupted"
    started=$RUN_DIR/logs/$JOB.started
    [[ -f $started ]] || touch "$started"
    touch "$LOG_DIR/started"
    # The user's checkpoint.resume=PATH holds until the run has saved, =never until this job has. Later attempts, and jobs
    # with the same PATH, continue from that checkpoint.
    from=$started again=()
    for word in "${ARGS[@]}"; do
      [[ $word != checkpoint.resume=*/* ]] || from=$RUN_DIR/logs/resume resume=$word
    done
    [[ $from == "$started" || $(cat "$from" 2>/dev/null) == "$resume" ]] || echo "$resume" >"$from"
    ! saved_since "$from" || again=(checkpoint.resume=auto)
    in_step "${START[@]}" ${again[@]+"${again[@]}"} || rc=$?
    [[ ! -f $RUN_DIR/interrupted ]] || [[ $stop == TERM ]] || requeue "step $(<"$RUN_DIR/interrupted") is saved"
    ((rc != 0)) || [[ -f $RUN_DIR/interrupted ]] || end 0 "trained to the end"
    ! saved_since "$LOG_DIR/started" || echo 0 >"$RUN_DIR/logs/$JOB.crashes"
  fi
  [[ $stop != TERM ]] || end 75 "ended by Slurm"
  [[ $stop != USR1 ]] || requeue "stopped, but the ranks exited with code $rc before they saved"
  # Settings that have trained before are sound: a file system that fails for a while also ends ranks with 2.
  ((rc != 2)) || saved_since "$RUN_DIR/logs/$JOB.started" || end 2 "$(tail -n 1 "$LOG_DIR/node0-rank0.log")"
  crashes=$(($(cat "$RUN_DIR/logs/$JOB.crashes" 2>/dev/null || echo 0) + 1))
  echo "$crashes" >"$RUN_DIR/logs/$JOB.crashes"
  culprit=$(grep -lsE '^Traceback|^megatron-aspo: ' "$LOG_DIR"/*.log | head -n 1 || true)
  [[ -z $culprit ]] || { say "last lines of $culprit:" && tail -n 3 "$culprit"; }
  ((crashes <= MAX_CRASHES)) ||
    end 1 "exit code $rc after MAX_CRASHES=$MAX_CRASHES crashes in a row without a new checkpoint; see $LOG_DIR"
  newest=$(newest_checkpoint)
  say "exit code $rc: crash $crashes of at most $MAX_CRASHES in a row; restarting from ${newest:-the beginning}"
done
