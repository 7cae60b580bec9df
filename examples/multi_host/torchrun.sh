#!/usr/bin/env bash
# One job of a run by torchrun. Start it on every host of the job, with the same arguments:
#   bash examples/multi_host/torchrun.sh CONFIG.yaml --job train  --hosts 4 --ranks-per-host 8 --meet host1:29500
#   bash examples/multi_host/torchrun.sh CONFIG.yaml --job serve  --hosts 1 --ranks-per-host 8 --meet host5:29500
#   bash examples/multi_host/torchrun.sh CONFIG.yaml --job inline --hosts 4 --ranks-per-host 8 --meet host1:29500
# --job J               train, serve, or inline (selection.mode: inline): the same ranks train and select in turns
# --hosts N             hosts of this job
# --ranks-per-host N    ranks on each, usually its GPUs
# --meet HOST:PORT      one of the job's hosts as the others reach it, and a port that is free there
# --set                 change a setting of CONFIG.yaml; repeatable
# Before: this repository and the active Python environment on every host; CONFIG.yaml, the pool and run.output_dir on a file system
# that all hosts share. What a host lacks is told at the start, by its name. When a host is lost the job ends; start the same
# command again on every host and the run goes on exactly where it stood.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

fail() { echo "error: $*" >&2; exit 1; }
case "${1:-}" in
    -h | --help) sed -n '2,13p' "${BASH_SOURCE[0]}"; exit 0 ;;
    "" | -*) fail "the first argument is the config file; see --help" ;;
esac
job="" hosts="" ranks="" meet=""
options=(--config "$1")
shift
while [ $# -gt 0 ]; do
    case "$1" in --job | --hosts | --ranks-per-host | --meet | --set) ;; *) fail "unknown argument $1; see --help" ;; esac
    [ $# -gt 1 ] || fail "$1 needs a value"
    case "$1" in
        --job) job=$2 ;;
        --hosts) hosts=$2 ;;
        --ranks-per-host) ranks=$2 ;;
        --meet) meet=$2 ;;
        --set) options+=(--set "$2") ;;
    esac
    shift 2
done
for needed in "job $job" "hosts $hosts" "ranks-per-host $ranks" "meet $meet"; do
    [ -n "${needed#* }" ] || fail "--${needed% *} is missing; see --help"
done

launch=(torchrun --nnodes "$hosts" --nproc-per-node "$ranks" --rdzv-backend c10d --rdzv-endpoint "$meet")
# Names of their own: inline, a host that is ahead must not meet the others where the turn before is ending.
train_command=("${launch[@]}" --rdzv-id groupmates-train -m megatron_groupmates train "${options[@]}")
serve_command=("${launch[@]}" --rdzv-id groupmates-serve -m megatron_groupmates serve "${options[@]}")
case "$job" in
    train) exec "${train_command[@]}" ;;
    serve) exec "${serve_command[@]}" ;;
    inline) source examples/jobs.sh; take_turns ;;
    *) fail "--job is train, serve or inline, not $job" ;;
esac
