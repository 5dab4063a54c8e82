"""tools/as_rank.sh: what Slurm and MPIs call a process, in torchrun's words."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "tools" / "as_rank.sh"
MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "2"}


def run(variables: dict[str, str]) -> subprocess.CompletedProcess:
    shell = ["printenv", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
    return subprocess.run([SCRIPT, *shell], env={"PATH": os.environ["PATH"], **variables}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("names", "rank"),
    # mpirun within a Slurm job: the process is MPI's, Slurm's variables are those of the script.
    [(SLURM, "5 8 1"), (OPEN_MPI, "3 4 0"), (MPICH, "2 3 2"), (SLURM | OPEN_MPI, "3 4 0")],
)
def test_names(names, rank):
    assert run(MASTER | names).stdout.split() == [*rank.split(), "node1", "29500"]


@pytest.mark.parametrize(("names", "said"), [(SLURM, "MASTER_ADDR: must name"), (MASTER, "started by mpirun or srun")])
def test_what_is_missing(names, said):
    done = run(names)
    assert done.returncode != 0 and said in done.stderr
