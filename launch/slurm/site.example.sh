# shellcheck shell=bash
# Copy this to site.sh (git ignores it) and say what your cluster needs. pipeline.sh and sweep.sbatch read it before
# they submit, every job before it starts; before a bare `sbatch`, source it yourself.
#
# sbatch reads these itself:
#   export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=my-project SBATCH_QOS=normal SBATCH_TIMELIMIT=24:00:00
# train.sbatch reads these:
#   export ZEROPREF_MODULES="cuda/12.4"
#   export ZEROPREF_CONTAINER="apptainer exec --nv --bind /scratch image.sif"
# and anything else that a job should do first:
#   source ~/zeropref/.venv/bin/activate
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
