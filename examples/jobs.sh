# Sourced by the launch scripts: how trainer and selection server go together, whatever starts them. The script sets
#   train_command, serve_command   arrays: one job each, from its start to its end; their exit codes are the jobs'
#   options                        array: --config and every --set, for the questions asked here on this host
# and calls run_jobs.
set -euo pipefail

# setting NAME: a setting of the run: mode, output_dir
setting() {
    python -m megatron_groupmates plan --no-data --json "${options[@]}" | python -c "import json, sys; print(json.load(sys.stdin)['$1'])"
}

# trainer_state: what the trainer left in the run directory, and its step
trainer_state() {
    local output_dir=$1
    ls -a "$output_dir" > /dev/null  # so that a network file system shows what another host has written
    python -m megatron_groupmates status "$output_dir" --json \
        | python -c 'import json, sys; trainer = json.load(sys.stdin)["trainer"]; print(trainer["state"], trainer.get("step", 0))'
}

running=()
# begin COMMAND...: in a process group of its own, so that whatever the launcher starts on this host ends with it
begin() {
    setsid "$@" &
    running+=("$!")
}

# end_all: whatever ends this script ends its jobs
end_all() {
    local job
    for job in "${running[@]}"; do kill -TERM -- "-$job" 2> /dev/null || true; done
    wait || true
}
trap end_all EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# train, serve [ARGUMENTS]: one job to its end; in the background, because a shell takes no signal while it waits in the foreground
train() { begin "${train_command[@]}"; finish; }
serve() { begin "${serve_command[@]}" "$@"; finish; }

# finish: wait for the job begun last; when it fails, what it has left on this host ends too
finish() {
    local job=${running[-1]} code=0
    wait "$job" || code=$?
    [ "$code" -eq 0 ] || kill -TERM -- "-$job" 2> /dev/null || true
    unset "running[-1]"
    return "$code"
}

# together: the server beside the trainer, each on its own ranks; when the trainer fails the server ends too
together() {
    begin "${serve_command[@]}"
    train
    finish
}

# take_turns: one set of ranks trains until a selection is due, selects, trains on, until training is finished
take_turns() {
    local output_dir state before=""
    output_dir=$(setting output_dir)
    train
    while state=$(trainer_state "$output_dir") && [[ "$state" = "awaiting_selection "* ]]; do
        if [ "$state" = "$before" ]; then
            echo "error: the selection server left the trainer at step ${state#* } with neither a selection nor a recorded failure; see what it printed" >&2
            exit 1
        fi
        before=$state
        serve --once || echo "the round failed; training goes on with the selection it has" >&2
        train
    done
    [ -n "$state" ]
}

# run_jobs: both, as selection.mode says
run_jobs() {
    local mode
    mode=$(setting mode)
    if [ "$mode" = inline ]; then take_turns; else together; fi
}
