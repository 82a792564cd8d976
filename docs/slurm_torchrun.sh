#!/bin/bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# One model on all GPUs of the job, gone on with after each of its time limits:
#   sbatch slurm_torchrun.sh runs/gbmlgg --cohort GBMLGG
out=$1
shift
if [ -f "$out/config.toml" ]; then set -- --resume; fi
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

stopped=
trap 'stopped=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 # not srun: it would kill the processes at once
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --rdzv-backend c10d \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:$((20000 + SLURM_JOB_ID % 10000))" \
  -m cftrain run --out "$out" "$@" &
step=$!
wait "$step"
code=$?
if [ -n "$stopped" ]; then
  wait "$step" # the first was ended by the signal; the checkpoints are being written
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
