#!/usr/bin/env bash
# Jobs in a row, each of which starts when the one before it has succeeded. Run it from the root of the clone:
#
#   launch/slurm/pipeline.sh --gpus-per-node=8 launch/train_dpo.py --config recipe.yaml --output runs/a \
#       then --gpus-per-node=1 eval/evaluate.py --model runs/a/model --output runs/a/eval
#   launch/slurm/pipeline.sh --gpus-per-node=8 launch/train_reward.py --config recipe.yaml --output runs/r \
#       then --gpus-per-node=1 eval/evaluate.py --reward_model runs/r/model --data pairs.jsonl --output runs/r/eval
#   launch/slurm/pipeline.sh --gpus-per-node=8 launch/train_reward.py --config recipe.yaml --output runs/r \
#       then --gpus-per-node=8 launch/train_ppo.py --config ppo.yaml --reward_model runs/r/model --output runs/p \
#       then --gpus-per-node=1 eval/evaluate.py --model runs/p/model --reward_model runs/r/model --output runs/p/eval
#
# A stage is what would stand after `sbatch`, less launch/slurm/train.sbatch: options of sbatch, written --name=value, a
# script, its flags. A job that is preempted keeps its number, and the next ones wait for it; if one fails, they go.
ZEROPREF_SLURM=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export ZEROPREF_SLURM
# shellcheck source=launch/slurm/environment.sh
. "$ZEROPREF_SLURM/environment.sh"
set -euo pipefail
jobs=()

submit() {
    local options=() id
    while [[ ${1-} == -* ]]; do
        options+=("$1")
        shift
    done
    if [ ! -f "${1-}" ]; then
        echo "error: stage $((${#jobs[@]} + 1)) has no script: [--sbatch-option=value ...] SCRIPT [flags] then ..." >&2
        exit 2
    fi
    if [ ${#jobs[@]} -gt 0 ]; then # without the second option, what depends on a job that failed would wait for ever
        options+=(--dependency="afterok:${jobs[-1]}" --kill-on-invalid-dep=yes)
    fi
    id=$(sbatch --parsable --job-name="$(basename "$1" .py)" "${options[@]}" "$ZEROPREF_SLURM/train.sbatch" "$@")
    jobs+=("${id%%;*}")
    echo "job ${jobs[-1]}: $*"
}

# All or nothing: a chain that cannot be submitted to its end leaves no job behind.
trap '[ $? -eq 0 ] || [ ${#jobs[@]} -eq 0 ] || scancel "${jobs[@]}"' EXIT
stage=()
for word in "$@" 'then'; do
    if [ "$word" = 'then' ]; then
        submit "${stage[@]}"
        stage=()
    else
        stage+=("$word")
    fi
done
