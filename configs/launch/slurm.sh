#!/usr/bin/env bash
# A training run on hosts of eight GPUs, by Slurm; from the root of the project:
#
#   sbatch --nodes 8 configs/launch/slurm.sh distill configs/distill_pod.py runs/distill
#
# What follows the folder of the run goes to the command, as --mesh fsdp=32,sequence=2 --set
# data.batch=32. One process a GPU; Slurm tells them of each other (--cluster).
#
# Restarts: ten minutes before the time is over the batch shell gets SIGTERM; all processes finish
# their step, save it and leave, and the job puts itself back into the queue. A lost node, and a
# job that is taken off, is put back by Slurm (--requeue). It goes on at the newest saved step.
#SBATCH --job-name=liveavatar
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -eu
stage=$1 config=$2 out=$3
shift 3
export ON_AGAIN="scontrol requeue $SLURM_JOB_ID"
export ON_TERM="scancel --signal=TERM $SLURM_JOB_ID" # srun itself would kill its tasks
exec configs/launch/again.sh srun --kill-on-bad-exit=1 \
  python -m "train.$stage" "$config" --out "$out" --cluster "$@"
