#!/usr/bin/env bash
# 4 machines of 8 GPUs: sbatch slurm.sh
#SBATCH --job-name=receipts
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1       # torchrun, which starts a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96        # 8 processes and their 64 data workers
#SBATCH --mem=0                   # all that a machine has
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600         # 600 seconds before the end, to the steps and not to this script
#SBATCH --requeue                 # after a node failed, or for a job of higher priority
#SBATCH --open-mode=append        # one log of all starts
#SBATCH --output=%x-%j.log
set -euo pipefail

output=/shared/receipts
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
# On the disk of each machine: home directories are mostly on a network disk
export HF_DATASETS_CACHE=/tmp/datasets-$UID TORCHTUNE_VL_CACHE=/tmp/torchtune-vl-$UID
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 10000))  # another one for each job that shares the machine

saved() { ls "$output/steps" 2>/dev/null || true; }
before=$(saved)
status=0
# Others save while the first to end has ended already: --kill-on-bad-exit would kill them
srun --kill-on-bad-exit=0 --wait=600 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  tune-vl run --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node 8 \
  --rdzv_backend c10d --rdzv_endpoint "$first:$port" --rdzv_id "$SLURM_JOB_ID" \
  --shutdown_timeout 540 \
  finetune --config qwen2_5_vl/full resume=True rows_per_step=64 \
  output_dir="$output" checkpoint_dir=/shared/Qwen2.5-VL-7B-Instruct \
  dataset.data_files=/shared/receipts.jsonl || status=$?

# Stopped by a signal, or another machine has gone. Without a new step the next start would not
# come further
if ((status >= 128)) && [[ $(saved) != "$before" ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
