"""RANK and its kin under launchers that set none: srun (so `deepspeed --launcher slurm`), mpirun, and a lone `python`.

torchrun, accelerate and deepspeed (alone, by pdsh or without ssh) set RANK themselves; then nothing is changed here, also
inside a Slurm job. What the user has set (MASTER_ADDR, MASTER_PORT) is kept.
"""

import os
import re
import socket
import subprocess
import zlib
from collections.abc import MutableMapping

from ds_stability.errors import UserError

FIRST_PORT, PORTS = 15000, 15000  # below the ports that Linux gives to clients (32768 on)
NO_STEP = 0xFFFFFFF0  # from here on a step id means a batch script or an interactive shell (SLURM_MAX_NORMAL_STEP_ID)
# Of MPI libraries that are not read here: a process that has one of these is not alone.
OTHER_LAUNCHERS = ("PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK", "PALS_RANKID")


def complete_environment(environment: MutableMapping[str, str] | None = None) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where the launcher did not.

    Call it before anything reads RANK. A process that no launcher started (also in the shell of salloc, or in a batch
    script, which Slurm tells of the whole job's tasks) is a run of one process.

    Args:
        environment: os.environ unless given.

    Raises:
        UserError: a variable that was exported contradicts the launcher, ranks cannot see their GPU, or rank 0's host is
            not known (mpirun on several hosts).
    """
    environment = os.environ if environment is None else environment
    if "RANK" in environment:
        return
    if "OMPI_COMM_WORLD_RANK" in environment:  # before Slurm: mpirun in a Slurm job starts its daemons as a step
        found = _of_open_mpi(environment)
    elif _in_step(environment):
        found = _of_slurm(environment)
    elif "WORLD_SIZE" in environment or any(name in environment for name in OTHER_LAUNCHERS):
        return
    else:
        found = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(_free_port())}  # fmt: skip
    for name, value in found.items():
        if not name.startswith("MASTER_") and environment.get(name, value) != value:
            raise UserError(f"{name}={environment[name]} is set, but the launcher started this process with {name}={value}; unset it")
    for name, value in found.items():
        environment.setdefault(name, value)


def is_rank(environment: MutableMapping[str, str] | None = None) -> bool:
    """Whether a launcher started this process as a rank."""
    environment = os.environ if environment is None else environment
    return "RANK" in environment or "OMPI_COMM_WORLD_RANK" in environment or _in_step(environment)


def _in_step(environment: MutableMapping[str, str]) -> bool:
    """Whether srun started this process. SLURM_PROCID and SLURM_NTASKS alone do not say so: a batch script has them too."""
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", ""))
    return step.isdigit() and int(step) < NO_STEP and "SLURM_PROCID" in environment


def _of_slurm(environment: MutableMapping[str, str]) -> dict[str, str]:
    """The variables of an srun task. Those of the step go before those of the job, which may have more tasks and nodes."""
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", ""))
    per_node = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "1")))
    local_size = per_node[int(environment.get("SLURM_NODEID", "0"))]
    _require_all_gpus(environment, local_size)
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")),
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(local_size),
        # A job may have several steps at a time, and a node several jobs.
        "MASTER_PORT": _port(f"{environment.get('SLURM_JOB_ID', '')}.{environment.get('SLURM_STEP_ID', '')}"),
    }
    if "MASTER_ADDR" not in environment:  # finding it may take a command
        found["MASTER_ADDR"] = "127.0.0.1" if len(per_node) == 1 else _address(first_host(nodes))
    return found


def _of_open_mpi(environment: MutableMapping[str, str]) -> dict[str, str]:
    """The variables of a process of mpirun, which does not tell where rank 0 runs."""
    found = {
        "RANK": environment["OMPI_COMM_WORLD_RANK"],
        "WORLD_SIZE": environment["OMPI_COMM_WORLD_SIZE"],
        "LOCAL_RANK": environment["OMPI_COMM_WORLD_LOCAL_RANK"],
        "LOCAL_WORLD_SIZE": environment["OMPI_COMM_WORLD_LOCAL_SIZE"],
        "MASTER_PORT": _port(environment.get("PMIX_NAMESPACE", environment.get("OMPI_MCA_ess_base_jobid", ""))),
    }
    if found["LOCAL_WORLD_SIZE"] == found["WORLD_SIZE"]:
        found["MASTER_ADDR"] = "127.0.0.1"
    elif "MASTER_ADDR" not in environment:
        raise UserError("mpirun on several hosts does not say which one has rank 0; add -x MASTER_ADDR=HOST to mpirun, or "
                        '--launcher_args "-x MASTER_ADDR=HOST" to deepspeed --launcher openmpi')  # fmt: skip
    return found


def _require_all_gpus(environment: MutableMapping[str, str], local_size: int) -> None:
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    devices = [device for device in visible.split(",") if device not in ("", "-1", "NoDevFiles")]  # the last: Slurm's "none"
    if 0 < len(devices) < local_size:
        raise UserError(f"CUDA_VISIBLE_DEVICES={visible} for {local_size} tasks on this node: a rank takes the GPU of its number, so each "
                        "must see all; give srun --gpus-per-node, not --gpus-per-task or --gpu-bind")  # fmt: skip


def first_host(nodes: str) -> str:
    """The first host of a Slurm list: "gpu[003,005-7],cpu1" -> "gpu003"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes).group()
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def tasks_per_node(counts: str) -> list[int]:
    """Slurm's "2(x3),1" -> [2, 2, 2, 1]."""
    numbers = []
    for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", counts):
        numbers += [int(count)] * int(times or 1)
    return numbers


def _address(host: str) -> str:
    """The host's name, or where that is known to Slurm only, its address in Slurm's configuration."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        command = ["scontrol", "--oneliner", "show", "node", host]
        try:
            text = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
        except (OSError, subprocess.SubprocessError):
            return host
        address = re.search(r"\bNodeAddr=(\S+)", text)
        return address.group(1) if address else host


def _port(job: str) -> str:
    """A port that all ranks of a job find alike and that two jobs of a host hardly share."""
    return str(FIRST_PORT + zlib.crc32(job.encode()) % PORTS)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
