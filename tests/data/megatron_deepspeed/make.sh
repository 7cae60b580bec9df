#!/usr/bin/env bash
# Make the checkpoints of this directory anew: make.sh CHECKOUT [VARIANT ...]
#
# CHECKOUT is Megatron-DeepSpeed at 4efb479d with torch's CPU in mind: `.view` in CoreAttention is `.reshape`, megatron/data is
# built. `deepspeed` of its environment must be the first on PATH. Random weights differ between torch releases; what the
# tests compare lies beside each checkpoint.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
checkout=$(cd "$1" && pwd)
shift
export PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH} DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 CUDA_DEVICE_MAX_CONNECTIONS=1

train() { # NAME RANKS MICRO_BATCH ZERO_STAGE DEEPSPEED_CONFIG [arguments of the checkout]
    local name=$1 ranks=$2 micro_batch=$3 stage=$4 settings=$5
    shift 5
    local out=$here/$name
    rm -rf "$out"
    mkdir -p "$out"
    cd "$out" # relative paths: the arguments are part of the checkpoints
    printf '{"train_batch_size": 4, "train_micro_batch_size_per_gpu": %s, "zero_optimization": {"stage": %s}, %s}' \
        "$micro_batch" "$stage" "$settings" >deepspeed.json
    deepspeed --num_accelerators "$ranks" --master_port 29733 "$here/train.py" \
        --deepspeed --deepspeed_config deepspeed.json --zero-stage "$stage" --no-pipeline-parallel \
        --distributed-backend gloo --use-cpu-initialization \
        --no-masked-softmax-fusion --no-bias-dropout-fusion --no-gradient-accumulation-fusion \
        --num-layers 2 --hidden-size 16 --ffn-hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 20 \
        --vocab-size 47 --make-vocab-size-divisible-by 4 --init-method-std 0.2 --attention-dropout 0 --hidden-dropout 0 \
        --micro-batch-size "$micro_batch" --global-batch-size 4 --train-iters 3 --eval-iters 0 --eval-interval 1000 --num-workers 0 \
        --seed 7 --lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0 --adam-beta2 0.95 \
        --layernorm-epsilon 1e-4 --save . --save-interval 2 --log-interval 1 "$@"
    rm -rf global_step3 zero_to_fp32.py deepspeed.json
    echo global_step2 >latest
    echo 2 >latest_checkpointed_iteration.txt
}

variant() {
    local clipped='"gradient_clipping": 0.5' llama="--swiglu --normalization rmsnorm --disable-bias-linear --no-bias-gelu-fusion
        --use-rotary-position-embeddings --untie-embeddings-and-output-weights --no-save-rng"
    case $1 in
    gpt-tp2-zero1) train "$1" 2 1 1 "$clipped" --decoupled --tensor-model-parallel-size 2 --no-bias-gelu-fusion ;;
    # With its fused kernel for gelu, which computes the tanh approximation, and with torch's Adam.
    gpt-dp2-zero2) train "$1" 2 2 2 "$clipped" --no-save-rng ;;
    gpt-dp2-zero3) train "$1" 2 2 3 "$clipped" --decoupled --no-bias-gelu-fusion --no-save-rng ;;
    llama-tp2-zero2) train "$1" 2 4 2 "$clipped" --decoupled --tensor-model-parallel-size 2 $llama ;;
    llama-dp2-zero1-bf16) train "$1" 2 1 1 "$clipped, \"bf16\": {\"enabled\": true}" --decoupled --bf16 $llama ;;
    esac
}

if [ $# = 0 ]; then set -- gpt-tp2-zero1 gpt-dp2-zero2 gpt-dp2-zero3 llama-tp2-zero2 llama-dp2-zero1-bf16; fi
for name in "$@"; do variant "$name"; done
