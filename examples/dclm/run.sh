#!/usr/bin/env bash
# Train with mid-run selection on GPU hosts:
#   bash examples/dclm/run.sh CONFIG.yaml [--trainer-hostfile H] [--server-hostfile S] [--set section.key=value ...]
# Trainer and selection server are two deepspeed jobs that share nothing but the run directory, which must lie on a file
# system that all hosts see. H and S are deepspeed hostfiles ("host slots=8" a line); without them both jobs run on this
# host, and --trainer-gpus / --server-gpus (deepspeed's --include form, for instance localhost:0,1) divide its GPUs.
# With selection.mode=inline in CONFIG one set of GPUs trains and selects in turns. Start the same command again after an
# interruption: both jobs go on where they stood.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

[ $# -gt 0 ] && [ "${1#-}" = "$1" ] || { sed -n '2,9p' "${BASH_SOURCE[0]}" >&2; exit 1; }
config=$1
shift
trainer=() server=() options=(--config "$config")
while [ $# -gt 0 ]; do
    [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2; exit 1; }
    case "$1" in
        # --force_multi: a hostfile of one host means that host, not this one.
        --trainer-hostfile) trainer+=(--force_multi --hostfile "$2") ;;
        --server-hostfile) server+=(--force_multi --hostfile "$2") ;;
        --trainer-gpus) trainer+=(--include "$2") ;;
        --server-gpus) server+=(--include "$2") ;;
        --set) options+=(--set "$2") ;;
        *) echo "error: unknown argument $1" >&2; exit 1 ;;
    esac
    shift 2
done

bash tools/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
python -m megatron_groupmates plan "${options[@]}"
train_command=(deepspeed -q "${trainer[@]}" --master_port 29500 --module megatron_groupmates train "${options[@]}")
serve_command=(deepspeed -q "${server[@]}" --master_port 29600 --module megatron_groupmates serve "${options[@]}")
source examples/jobs.sh
run_jobs
python -m megatron_groupmates report "$(setting output_dir)"
