#!/usr/bin/env bash
# Trainer on some hosts, selection server on others, started from here by `deepspeed --hostfile` through pdsh and ssh:
#   bash examples/multi_host/deepspeed.sh CONFIG.yaml --trainers HOSTFILE [--servers HOSTFILE] [--set section.key=value ...]
# --trainers H   deepspeed hostfile, "host slots=8" a line: the trainer's hosts and ranks on each
# --servers S    the same for the selection server; not with selection.mode: inline, where the trainers' hosts do both in turns
# --set          change a setting of CONFIG.yaml
# --port N       first of two free ports on the first trainer and server host (default: 29500)
# Before: pdsh here; ssh without a password to every host; this repository and the Python environment that is active here at the
# same paths on every host; CONFIG.yaml, the pool and run.output_dir on a file system that all hosts share. What a host lacks is
# told at the start, by its name. Environment variables set here do not reach the other hosts: settings go into CONFIG.yaml or --set.
# When a host is lost both jobs end; start the same command again and the run goes on exactly where it stood.
# On one host without GPUs give ranks by a hostfile (localhost slots=2): deepspeed --include counts a CPU host as one slot.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

fail() { echo "error: $*" >&2; exit 1; }
case "${1:-}" in
    -h | --help) sed -n '2,12p' "${BASH_SOURCE[0]}"; exit 0 ;;
    "" | -*) fail "the first argument is the config file; see --help" ;;
esac
config=$1 trainers="" servers="" port=29500
options=(--config "$config")
shift
while [ $# -gt 0 ]; do
    case "$1" in --trainers | --servers | --set | --port) ;; *) fail "unknown argument $1; see --help" ;; esac
    [ $# -gt 1 ] || fail "$1 needs a value"
    case "$1" in
        --trainers) trainers=$2 ;;
        --servers) servers=$2 ;;
        --set) options+=(--set "$2") ;;
        --port) port=$2 ;;
    esac
    shift 2
done
[ -n "$trainers" ] || fail "--trainers is missing; see --help"
for hostfile in "$trainers" ${servers:+"$servers"}; do [ -f "$hostfile" ] || fail "there is no hostfile $hostfile"; done

source examples/jobs.sh
mode=$(setting mode)
if [ "$mode" = inline ]; then
    [ -z "$servers" ] || fail "selection.mode is inline: the trainers' hosts do both, so leave out --servers"
    servers=$trainers
elif [ -z "$servers" ]; then
    fail "selection.mode is $mode: the selection server needs hosts of its own, give --servers"
fi
# pdsh reads this here: the ssh connection to a host that has lost its power ends too.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ServerAliveInterval=10 -o ServerAliveCountMax=4"
# --force_multi: a hostfile of one host means that host, not this one.
launch=(deepspeed -q --force_multi)
train_command=("${launch[@]}" --hostfile "$trainers" --master_port "$port" --module megatron_groupmates train "${options[@]}")
serve_command=("${launch[@]}" --hostfile "$servers" --master_port "$((port + 1))" --module megatron_groupmates serve "${options[@]}")
run_jobs
