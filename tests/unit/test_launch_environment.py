"""Which rank a process is, from what srun, mpirun or nobody has set; and words that reach the hosts of a hostfile unharmed."""

import collections
import json
import os
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_stability import launch_environment
from ds_stability.errors import UserError
from ds_stability.launch_environment import complete_environment, first_host, tasks_per_node
from ds_stability.launchers.sweep_hosts import Hosts

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "4",
         "SLURM_NODELIST": "gpu[3-4]", "SLURM_TASKS_PER_NODE": "2(x2)"}  # fmt: skip
TASK = {**BATCH, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NODELIST": "gpu[3-4]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "MASTER_ADDR": "gpu3"}  # fmt: skip
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
       "PMIX_NAMESPACE": "373948417", "PMIX_RANK": "1"}  # fmt: skip


def completed(environment):
    environment = dict(environment)
    complete_environment(environment)
    return environment


def ranks(environment):
    return [completed(environment).get(name) for name in NAMES]


def test_a_task_of_srun():
    found = completed(TASK)
    assert [found[name] for name in NAMES] == ["3", "4", "1", "2"]
    assert found["MASTER_ADDR"] == "gpu3" and 15000 <= int(found["MASTER_PORT"]) < 30000


def test_tasks_of_a_step_share_their_port_and_steps_and_jobs_do_not():
    port = completed(TASK)["MASTER_PORT"]
    assert completed({**TASK, "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"})["MASTER_PORT"] == port
    assert completed({**TASK, "SLURM_STEP_ID": "1"})["MASTER_PORT"] != port != completed({**TASK, "SLURM_JOB_ID": "8"})["MASTER_PORT"]
    assert completed({**TASK, "MASTER_PORT": "1234"})["MASTER_PORT"] == "1234"


def test_the_step_counts_not_the_job():
    step = {**TASK, "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_STEP_NODELIST": "gpu4", "SLURM_STEP_TASKS_PER_NODE": "1"}  # fmt: skip
    del step["MASTER_ADDR"]
    assert ranks(step) == ["0", "1", "0", "1"] and completed(step)["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize("shell", [{}, {"SLURM_STEP_ID": "4294967290"}, {"SLURM_STEP_ID": "4294967291"}])
def test_a_lone_process_in_the_shell_of_a_job_is_one_process(shell):
    found = completed({**BATCH, **shell})
    assert [found[name] for name in NAMES] == ["0", "1", "0", "1"] and found["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize("outer", [BATCH, TASK, MPI, {**TASK, **MPI}, {}])
def test_a_launcher_inside_a_job_wins(outer):
    inner = {**outer, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5"}
    assert completed(inner) == inner


def test_mpirun_also_in_a_slurm_job_and_without_mpi4py():
    assert ranks({**TASK, **MPI}) == ranks(MPI) == ["1", "2", "1", "2"]
    assert completed(MPI)["MASTER_ADDR"] == "127.0.0.1"
    apart = {**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    with pytest.raises(UserError, match="-x MASTER_ADDR=HOST"):
        complete_environment(apart)
    assert ranks({**apart, "MASTER_ADDR": "a"}) == ["1", "2", "0", "1"]


@pytest.mark.parametrize("other", [{"PMI_RANK": "1"}, {"MV2_COMM_WORLD_RANK": "0"}, {"WORLD_SIZE": "2"}])
def test_a_launcher_that_is_not_known_is_not_taken_for_none(other):
    assert completed(other) == other


def test_contradictions_are_told():
    with pytest.raises(UserError, match=r"WORLD_SIZE=8 is set.*WORLD_SIZE=4; unset it"):
        completed({**TASK, "WORLD_SIZE": "8"})
    assert completed({**TASK, "WORLD_SIZE": "4"})["RANK"] == "3"
    with pytest.raises(UserError, match="--gpus-per-node"):
        completed({**TASK, "CUDA_VISIBLE_DEVICES": "0"})
    for visible in ("0,1", "", "-1", "NoDevFiles"):
        assert completed({**TASK, "CUDA_VISIBLE_DEVICES": visible})["LOCAL_RANK"] == "1"


@pytest.mark.parametrize(("nodes", "first"), [
    ("node1", "node1"), ("node1,node2", "node1"), ("gpu[003,005-7],cpu1", "gpu003"), ("a-b[10-12]", "a-b10"),
    ("rack[1-2]n[3,5]", "rack1n3"), ("n[1-2]-x,y", "n1-x"),
])  # fmt: skip
def test_first_host(nodes, first):
    assert first_host(nodes) == first


def test_tasks_per_node():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1] and tasks_per_node("8") == [8] and tasks_per_node("1,2(x2)") == [1, 2, 2]


def test_a_host_that_only_slurm_knows_is_found_by_its_address(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "--oneliner show node gpu3" ] && echo "NodeName=gpu3 NodeAddr=10.1.2.3 NodeHostName=x"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    known = {"gpu3": False}

    def resolve(host, port):
        if not known[host]:
            raise OSError("unknown")

    monkeypatch.setattr(launch_environment.socket, "getaddrinfo", resolve)
    task = {key: value for key, value in TASK.items() if key != "MASTER_ADDR"}
    assert completed(task)["MASTER_ADDR"] == "10.1.2.3"
    known["gpu3"] = True
    assert completed(task)["MASTER_ADDR"] == "gpu3"
    known["gpu3"] = False
    scontrol.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert completed(task)["MASTER_ADDR"] == "gpu3"  # the error of the connection will name it


NASTY = ["--output_dir", "o' \"x\" $(touch pwned) ;#", "$(touch pwned)", "`touch pwned`", "a b`touch pwned`$HOME\\", "'", "\\", "a\nb c", "",
         "%n %h %%", "%u", "-0.5", "- x", "a;touch pwned", "&", "*", "~", "é ü", "\\$ \\\" x"]  # fmt: skip


def launched(tmp_path, words, how):
    """What DeepSpeed's launcher on a host gets, through the real PDSHRunner, and pdsh with an ssh that stays here."""
    from deepspeed.launcher import runner

    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    command = Hosts(2, str(tmp_path / "hosts")).command(tmp_path / "my $(touch pwned) script.py", words, 29500)
    args = runner.parse_args([*command[3:5], "--master_addr", "a", *command[5:]])
    resources = collections.OrderedDict(a=[0], b=[0])
    pdsh = runner.PDSHRunner(args, "world")
    pdsh.add_export("PYTHONPATH", str(tmp_path / "stub"))
    line, _, environment = pdsh.get_cmd(dict(os.environ), resources)
    stub = tmp_path / "stub" / "deepspeed" / "launcher"
    stub.mkdir(parents=True, exist_ok=True)
    for folder in (stub, stub.parent):
        (folder / "__init__.py").touch()
    (stub / "launch.py").write_text(f"import json, sys\njson.dump(sys.argv[1:], open({str(tmp_path / 'got.json')!r}, 'w'))\n")
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir(exist_ok=True)
    ssh.write_text('#!/bin/sh\nwhile [ "$1" != -x ]; do shift; done\n[ "$2" = a ] || exit 0\nshift 2\nexec sh -c "$*"\n')
    ssh.chmod(0o755)
    environment.update(PATH=f"{ssh.parent}{os.pathsep}{environment['PATH']}", PDSH_SSH_ARGS="-x %h")
    if how == "sh":
        remote = " ".join(line[line.index("a,b") + 1:])
        line = ["sh", "-c", remote.replace("%%", "\0").replace("%n", "0").replace("%h", "a").replace("%u", "me").replace("\0", "%")]
    process = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (tmp_path / "got.json").exists(), f"{process.stdout}{process.stderr}{line}"
    got = json.loads((tmp_path / "got.json").read_text())
    (tmp_path / "got.json").unlink()
    assert not list(tmp_path.rglob("pwned"))
    return got[-1 - len(words):]


@pytest.mark.parametrize("how", ["sh", "pdsh"])
def test_words_reach_the_hosts_of_a_hostfile_unharmed(tmp_path, monkeypatch, how):
    if how == "pdsh" and shutil.which("pdsh") is None:
        pytest.skip("needs pdsh")
    monkeypatch.chdir("/")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert launched(tmp_path, NASTY, how) == [str(tmp_path / "my $(touch pwned) script.py"), *NASTY]


@given(words=st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12), max_size=4))
def test_any_word_is_one_word_for_the_shell(words):
    from ds_stability.launchers.sweep_hosts import pdsh_word

    # As PDSHRunner.parse_user_args does.
    sent = ['"{}"'.format(word.replace('"', '\\"')) if " " in word else word for word in map(pdsh_word, words)]
    line = " ".join(sent).replace("%%", "%")
    got = subprocess.run(["sh", "-c", f'for word in {line}; do printf "%s\\0" "$word"; done'], capture_output=True, check=True).stdout
    assert got.decode() == "".join(f"{word}\0" for word in words)


def test_surroundings_that_deepspeed_does_not_quote_are_refused(tmp_path, monkeypatch):
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    folder = tmp_path / "my folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=r"the current folder is .*my folder"):
        Hosts(2, str(tmp_path / "hosts")).command(tmp_path / "x.py", [], 1)
    (tmp_path / "hosts").write_text("localhost slots=2\n")  # started without pdsh: nothing is quoted, nothing needs it
    assert Hosts(2, str(tmp_path / "hosts")).command(tmp_path / "x.py", ["a b"], 1)[-1] == "a b"
    assert sys.executable == Hosts(2).command(tmp_path / "x.py", [], 1)[0]
