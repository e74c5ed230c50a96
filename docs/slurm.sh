#!/bin/bash
# All five phases of my.yaml on two machines with eight GPUs each: sbatch docs/slurm.sh
# Submit it from the project's folder, on a file system that all machines see. Submitted again, it goes on.
#SBATCH --job-name=modernbert-small
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

first_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # not head, whose end would end scontrol too

# One torchrun on each machine, which starts a process for each of its GPUs.
everywhere() {
    srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$SLURM_GPUS_ON_NODE" \
        --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first_host:29500" "$@"
}

everywhere mlm/create_dataset.py --config my.yaml
python mlm/init_model_mlm.py --config my.yaml
everywhere mlm/pre_train.py --config my.yaml
everywhere create_distil_dataset.py --config my.yaml
everywhere distil_train.py --config my.yaml
