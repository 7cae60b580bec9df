#!/usr/bin/env bash
# From nothing to a language model trained with two mid-run selection refreshes, compared with two controls:
#   bash examples/quickstart/run.sh [--output DIR] [--all-arms] [--max-bytes SIZE] [--set section.key=value ...]
# --output DIR   run directory (default: runs/quickstart)
# --all-arms     also train the `individual` arm: the same oracles without the relation between samples
# --max-bytes    text gathered for the pool (default: 7M)
# --set          change a setting of examples/quickstart/config.yaml in every arm
# Needs Python 3.11 or newer and a network or a package cache for the set-up; no GPU, no model hub, no data set.
# Kill it at any time and start it again: it goes on where it stood.
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

output=runs/quickstart
arms=(group random similarity)
max_bytes=7M
settings=()
while [ $# -gt 0 ]; do
    case "$1" in
        --output) [ $# -gt 1 ] || { echo "error: --output needs a directory" >&2; exit 1; }
                  case "$2" in /*) output=$2 ;; *) output=$called_from/$2 ;; esac; shift ;;
        --all-arms) arms+=(individual) ;;
        --max-bytes) [ $# -gt 1 ] || { echo "error: --max-bytes needs a size such as 7M" >&2; exit 1; }; max_bytes=$2; shift ;;
        --set) [ $# -gt 1 ] || { echo "error: --set needs section.key=value" >&2; exit 1; }; settings+=(--set "$2"); shift ;;
        -h|--help) sed -n '2,9p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) echo "error: unknown argument $1; see --help" >&2; exit 1 ;;
    esac
    shift
done

bash tools/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' && gpu=yes || gpu=no
[ "$gpu" = yes ] || export DS_ACCELERATOR=cpu  # spares DeepSpeed the search for one
data=$output/data

say() { printf '== %s\n' "$*" >&2; }
arm_dir() { if [ "$1" = group ]; then echo "$output"; else echo "$output/arms/$1"; fi; }
# finished: the report covers every arm asked for
finished() {
    python - "$output/summary.json" "${arms[@]}" 2>/dev/null <<'PY'
import json, sys
sys.exit(not set(sys.argv[2:]) <= set(json.load(open(sys.argv[1]))["arms"]))
PY
}

if finished; then
    echo "$output is finished: nothing to do. See $output/report.html"
    exit 0
fi

# Two ranks share each layer; with one GPU, one rank holds it whole.
ranks=2
if [ "$gpu" = yes ] && [ "$(nvidia-smi -L | wc -l)" -lt 2 ]; then
    ranks=1
    settings=(--set parallel.tensor_model_parallel_size=1 "${settings[@]}")
fi
settings=(--set "data.pool=$data/pool" --set "data.reference=$data/reference" --set "data.evaluation=$data/evaluation" "${settings[@]}")
# job PORT COMMAND ARM [ARGUMENTS]: a deepspeed job on this host
job() {
    local port=$1 command=$2 arm=$3
    shift 3
    deepspeed -q --num_gpus "$ranks" --master_port "$port" --module megatron_groupmates "$command" --config examples/quickstart/config.yaml \
        "${settings[@]}" --set "run.name=$arm" --set "run.output_dir=$(arm_dir "$arm")" "$@"
}
# together ARM [ARGUMENTS]: the trainer with the selection server beside it
together() {
    local arm=$1 server
    shift
    job 29600 serve "$arm" "$@" &
    server=$!
    trap 'kill "$server" 2>/dev/null || true' EXIT
    job 29500 train "$arm" "$@"
    wait "$server"
    trap - EXIT
}

say "text of this machine: gather, train a tokenizer, tokenise"
python tools/gather_documents.py --output "$data/raw" --max-bytes "$max_bytes" --reference-bytes 200K --evaluation-bytes 200K
[ -d "$data/tokenizer" ] || python tools/train_tokenizer.py --input "$data/raw/pool" --output "$data/tokenizer" --vocab-size 2048
for part in pool reference evaluation; do
    python tools/preprocess_dclm.py --input "$data/raw/$part" --output "$data/$part" --tokenizer "$data/tokenizer" --pack 129
done
python -m megatron_groupmates plan --config examples/quickstart/config.yaml --gpus "$ranks" --server-gpus "$ranks" --tflops 0.05 "${settings[@]}"

say "arm group: warm-up on random data, then selection by the server beside the trainer"
together group
branch=global_step$(python -c 'import sys, yaml; print(yaml.safe_load(open(sys.argv[1]))["selection"]["first_refresh_step"])' "$output/config.yaml")
branching=(--set "checkpoint.load=$output/checkpoints" --set "checkpoint.load_tag=$branch")

say "arm random: the same warm-up and token budget, no selection"
job 29500 train random "${branching[@]}" --set selection.method=random --set selection.max_refreshes=0 --set selection.max_staleness_steps=null

say "arm similarity: the same refreshes, with the samples most similar to the reference set (no oracle)"
together similarity "${branching[@]}" --set selection.method=similarity

if [[ " ${arms[*]} " == *" individual "* ]]; then
    say "arm individual: the same oracles, no relation between samples"
    together individual "${branching[@]}" --set selection.method=individual
fi

directories=()
for arm in "${arms[@]}"; do directories+=("$(arm_dir "$arm")"); done
python -m megatron_groupmates report "${directories[@]}"
python - "$output/summary.json" <<'PY'
import json, sys
print("\n".join(json.load(open(sys.argv[1]))["conclusions"]))
PY
echo "run directory  $output"
echo "look at        $output/report.html"
echo "where it stood python -m megatron_groupmates status $output"
