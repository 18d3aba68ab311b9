#!/usr/bin/env bash
# Fine-tunes a LLaMA on your instructions. Without any variable: the embedded base on the sample, on whatever is here.
#
#   bash finetune.sh
#   MODEL_PATH=huggyllama/llama-7b DATA_PATH=merge.json TEST_SIZE=2000 bash finetune.sh --wandb
#   TOT_CUDA="0,1,2,3" MODEL_PATH=huggyllama/llama-13b DATA_PATH=merge.json bash finetune.sh --bits 4
#
# Every variable can be set from the environment; what follows on the command line goes to finetune.py (--help).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

TOT_CUDA=${TOT_CUDA-${CUDA_VISIBLE_DEVICES-0}}            # GPUs to use: "0,1,2,3"; "": none
PORT=${PORT:-12345}                                       # for the processes to meet, with several GPUs
DATA_PATH=${DATA_PATH:-"sample/merge_sample.json"}        # a file, several joined by commas, or a directory
OUTPUT_PATH=${OUTPUT_PATH:-"lora-Vicuna"}                 # the adapter goes here
MODEL_PATH=${MODEL_PATH:-"models/smollm2-135m-instruct"}  # a directory or a hub id
TEST_SIZE=${TEST_SIZE:-40}                                # records held out

source setup.sh requirements.txt
if [ "$MODEL_PATH" = models/smollm2-135m-instruct ]; then "$PYTHON" tools/get_base.py; fi

export CUDA_VISIBLE_DEVICES=$TOT_CUDA
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
CUDAS=(${TOT_CUDA//,/ })
HERE=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
COMMAND=("$PYTHON")
for CUDA in ${CUDAS[@]+"${CUDAS[@]}"}; do  # a card that is not there would mean a run on the CPU, in silence
    if [[ $CUDA =~ ^[0-9]+$ ]] && [ "$CUDA" -ge "$HERE" ] && { [ "$CUDA" != 0 ] || [ ${#CUDAS[@]} -gt 1 ]; }; then
        echo "error: TOT_CUDA=\"$TOT_CUDA\" names GPU $CUDA, this machine has $HERE (numbered from 0)" >&2
        exit 2
    fi
done
if [ ${#CUDAS[@]} -gt 1 ]; then
    OMP_NUM_THREADS=$(( OMP_NUM_THREADS / ${#CUDAS[@]} > 0 ? OMP_NUM_THREADS / ${#CUDAS[@]} : 1 ))
    COMMAND=("$PYTHON" -m vicuna.launch --nproc_per_node="${#CUDAS[@]}" --master_port="$PORT")
fi

# finetune.py's defaults suit a 7B model and 10,000 records or more. The sample has 300: small batches, a high rate, and
# for the small embedded base a LoRA on all its layers. Flags on the command line come later, so they win.
SIZES=()
if [ "$DATA_PATH" = sample/merge_sample.json ] && [[ " $* " != *" --data_path"* ]]; then
    SIZES=(--batch_size $(( 4 * ${#CUDAS[@]} > 8 ? 4 * ${#CUDAS[@]} : 8 )) --num_epochs 2 --learning_rate 1e-3
           --warmup_steps 5 --eval_steps 26 --save_steps 26 --logging_steps 6)
    if [ "$MODEL_PATH" = models/smollm2-135m-instruct ]; then
        SIZES+=(--lora_target_modules q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj)
    fi
fi

exec "${COMMAND[@]}" finetune.py \
    --data_path "$DATA_PATH" \
    --output_path "$OUTPUT_PATH" \
    --model_path "$MODEL_PATH" \
    --test_size "$TEST_SIZE" \
    ${SIZES[@]+"${SIZES[@]}"} \
    "$@"
