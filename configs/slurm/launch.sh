#!/bin/bash
# What the .sbatch files share: one process a GPU on every node of the job, and a place in the queue again when the job
# was stopped before its run was done.
#
#   launch.sh <run directory> <accelerate configuration> <script, or -m module> [options]
#
# SLURM sends SIGUSR1 before the time is up (#SBATCH --signal), and SIGTERM where it preempts a job. The run then saves
# a checkpoint and leaves <run directory>/stopped.json: accelerate makes 1 of every exit code, so the file tells.
set -u

run_dir=$1 config=$2
shift 2
resume=()
if [ -e "$run_dir/config.json" ]; then resume=(--resume); fi
rm -f "$run_dir/stopped.json" # of the job before: this one writes its own, unless the run is refused
main_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# accelerate itself must outlive the signal that its processes handle; what is ignored here it ignores as well.
srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 bash -c '
    trap "" USR1
    exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' launch \
    --config-file "$config" --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * SLURM_GPUS_ON_NODE)) \
    --main_process_ip "$main_node" --main_process_port $((20000 + SLURM_JOB_ID % 10000)) \
    "$@" --run-dir "$run_dir" "${resume[@]}"
status=$?

if [ -e "$run_dir/stopped.json" ]; then
    scontrol requeue "$SLURM_JOB_ID"
    status=0
fi
exit $status
