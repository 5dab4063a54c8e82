#!/bin/sh
# Names a process that Slurm, Open MPI or another MPI has started as torchrun would name it, and runs the program:
#   srun tools/as_rank.sh python script.py
# MASTER_ADDR and MASTER_PORT, a host that all reach and a free port there, must be set before.
: "${MASTER_ADDR:?must name the host of rank 0}" "${MASTER_PORT:?must be a free port of that host}"
RANK=${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-$SLURM_PROCID}}
WORLD_SIZE=${OMPI_COMM_WORLD_SIZE:-${PMI_SIZE:-$SLURM_NTASKS}}
LOCAL_RANK=${OMPI_COMM_WORLD_LOCAL_RANK:-${MPI_LOCALRANKID:-$SLURM_LOCALID}}
: "${RANK:?none of OMPI_COMM_WORLD_RANK, PMI_RANK and SLURM_PROCID is set: was this started by mpirun or srun}"
export MASTER_ADDR MASTER_PORT RANK WORLD_SIZE LOCAL_RANK
exec "$@"
