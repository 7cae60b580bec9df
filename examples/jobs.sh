# Sourced by the launch scripts: how trainer and selection server go together, whatever starts them. The script sets
#   train_command, serve_command   arrays: one job each, from its start to its end; their exit codes are the jobs'
#   options                        array: --config and every --set, for the questions asked here on this host
# and calls run_jobs.
set -euo pipefail

# setting NAME: a setting of the run: mode, output_dir
setting() {
    python -m megatron_groupmates plan --no-data --json "${options[@]}" | python -c "import json, sys; print(json.load(sys.stdin)['$1'])"
}

# trainer_state: what the trainer left in the run directory
trainer_state() {
    local output_dir=$1
    ls -a "$output_dir" > /dev/null  # so that a network file system shows what another host has written
    python -m megatron_groupmates status "$output_dir" --json | python -c 'import json, sys; print(json.load(sys.stdin)["trainer"]["state"])'
}

# together: the server beside the trainer, each on its own ranks; when the trainer fails the server ends too
together() {
    # In a process group of its own, so that whatever the launcher has started on this host ends with it.
    setsid "${serve_command[@]}" &
    server_job=$!
    trap 'kill -TERM -- "-$server_job" 2> /dev/null || true; wait "$server_job" || true' EXIT
    "${train_command[@]}"
    wait "$server_job"
    trap - EXIT
}

# take_turns: one set of ranks trains until a selection is due, selects, trains on, until training is finished
take_turns() {
    local output_dir
    output_dir=$(setting output_dir)
    "${train_command[@]}"
    while [ "$(trainer_state "$output_dir")" = awaiting_selection ]; do
        "${serve_command[@]}" --once || echo "the round failed; training goes on with the selection it has" >&2
        "${train_command[@]}"
    done
}

# run_jobs: both, as selection.mode says
run_jobs() {
    if [ "$(setting mode)" = inline ]; then take_turns; else together; fi
}
