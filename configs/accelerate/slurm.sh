#!/bin/bash
# sbatch configs/accelerate/slurm.sh --config configs/recipes/tinted-sd_dmd2.yaml --train.sharding fsdp
# One task for each GPU of each machine. Two minutes before its time is up every task gets SIGUSR1 and saves a checkpoint
# at the end of its step; the job is then put back into the queue, where it goes on from that checkpoint.
#SBATCH --job-name=fastgen
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}

flags=("$@")
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && flags+=(--resume)
# Each task becomes the process that trains, so that the signal reaches it and its exit code comes back.
srun bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec python train.py "$@"' \
    train.py "${flags[@]}"
code=$?
[ "$code" -eq 75 ] && exec scontrol requeue "$SLURM_JOB_ID"
exit "$code"
