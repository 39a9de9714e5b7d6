"""What a SLURM job does around its ranks, piece by piece; `test_slurm.py` has it on a real SLURM."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from tiny_shards import data_of, digest, ragged_corpus, train_batches

from audiossl.checkpoints.runlock import locked
from audiossl.cluster.allocation import Allocation, meeting_address, read_allocation
from audiossl.cluster.command import settle
from audiossl.cluster.requeue import FRUITLESS, RECORD, may_return
from audiossl.cluster.staging import place_of, stage
from audiossl.errors import UserError
from audiossl.index import Index

SLURM = {"SLURM_JOB_ID": "20042", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}
SCRIPT = ROOT / "slurm" / "run.sbatch"


def two_nodes(_):
    return ["n1", "n2"]


def job(**changes) -> Allocation:
    facts = dict(job_id=7, restarts=0, array=None, nodes=("n1", "n2"), tasks=4, tasks_per_node=2, gpus_per_node=2)
    return Allocation(**facts | changes)


def test_a_job_is_read_from_slurms_variables():
    read = read_allocation(SLURM | {"SLURM_GPUS_ON_NODE": "4", "SLURM_RESTART_COUNT": "2"}, two_nodes)
    assert (read.tasks, read.tasks_per_node, read.gpus_per_node, read.restarts) == (8, 4, 4, 2)
    assert read.name == "20042" and read.port == 12_042
    task = read_allocation(SLURM | {"SLURM_ARRAY_JOB_ID": "20040", "SLURM_ARRAY_TASK_ID": "2"}, two_nodes)
    assert task.name == "20040_2"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, "--gpus-per-node=8 --ntasks-per-node=8"),
        ({"SLURM_NTASKS": "7"}, "7 tasks on 2 nodes"),
    ],
)
def test_tasks_that_do_not_pair_off_with_gpus_or_nodes_are_refused(changes, said):
    with pytest.raises(UserError, match=said):
        read_allocation(SLURM | changes, two_nodes)


@pytest.mark.parametrize(
    "names, addresses, own, expected",
    [
        ({"n1": "10.0.0.1", "n2": "10.0.0.2"}, {}, None, "10.0.0.1"),
        ({"n1": "127.0.1.1", "n2": "10.0.0.2"}, {}, "10.0.0.1", "10.0.0.1"),  # Debian's own name in /etc/hosts
        ({"127.0.0.1": "127.0.0.1"}, {"n1": "127.0.0.1", "n2": "127.0.0.1"}, "127.0.0.1", "127.0.0.1"),  # one machine
        ({"10.1.0.1": "10.1.0.1", "10.1.0.2": "10.1.0.2"}, {"n1": "10.1.0.1", "n2": "10.1.0.2"}, None, "10.1.0.1"),
    ],
)
def test_the_ranks_meet_where_every_node_reaches_the_first(names, addresses, own, expected):
    found = meeting_address(["n1", "n2"], names.get, lambda node: addresses.get(node, node), lambda address: own)
    assert found == expected


def test_a_node_that_nobody_knows_is_named():
    with pytest.raises(UserError, match="node n2: neither its name"):
        meeting_address(["n1", "n2"], {"n1": "10.0.0.1"}.get, lambda node: node, lambda address: None)


def test_a_job_gets_what_it_needs_to_go_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = settle(str(ROOT / "train.py"), ["model=audiomae", "trainer=cpu"], job())
    assert command.arguments == ("model=audiomae", "trainer=cpu", "ckpt=last", "trainer.devices=4")
    assert command.folder == tmp_path / "runs" / "audiomae_tiny_demo"
    assert command.shards == {"data.shards": str(ROOT / "demo" / "shards")}
    given = settle(str(ROOT / "train.py"), ["name=x", "ckpt=must", "trainer.devices=4"], job())
    assert given.arguments == ("name=x", "ckpt=must", "trainer.devices=4") and given.folder.name == "x"


def test_a_task_of_an_array_runs_its_point_in_the_folder_that_all_share(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    alone = dict(nodes=("n1",), tasks=1, tasks_per_node=1, gpus_per_node=1, array=(40, 2))
    command = settle(str(ROOT / "train.py"), ["-m", "model.mask_ratio=0.7,0.8,0.9"], job(**alone))
    assert command.folder == tmp_path / "runs" / "sweep_40" / "2"
    assert command.arguments == ("-m", "model.mask_ratio=0.7,0.8,0.9", "ckpt=last")
    with pytest.raises(UserError, match="no point 3; submit it with --array=0-2"):
        settle(str(ROOT / "train.py"), ["-m", "model.mask_ratio=0.7,0.8,0.9"], job(**alone | {"array": (40, 3)}))
    with pytest.raises(UserError, match="an array job runs a point"):
        settle(str(ROOT / "train.py"), ["name=x"], job(**alone))


@pytest.mark.parametrize(
    "words, said",
    [
        (["train.py", "hydra.run.dir=runs/${now:%H}"], "named by the time"),
        (["train.py", "modl=audiomae"], "modl"),
        (["train.py", "trainer.devices=5"], "trainer.devices=5: the job has 4 tasks, 2 nodes x 2"),
        (["train.py", "--cfg", "job"], "--cfg: a job takes KEY=VALUE"),
        (["README.md"], "is none of train.py"),
        (["finetune.py", "init=x", "task.root=x", "dry_run=true"], "dry_run=true: finetune.py cannot be planned"),
        (["probe.py", "init=x", "task.root=x"], "4 tasks, and probe.py runs on one; submit with --nodes=1 .*=1 .*=1"),
        (["probe.py", "init=x", "trainer=cpu"], "trainer: cannot be chosen with this command; leave it out"),
    ],
)
def test_a_wrong_command_ends_before_any_rank_starts(words, said):
    with pytest.raises(UserError, match=said):
        settle(str(ROOT / words[0]), words[1:], job())


def test_a_job_submitted_from_another_folder_is_told_the_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"train.py: is not in {tmp_path}, .* give the whole path: {ROOT}/train.py"):
        settle("train.py", ["trainer=cpu"], job())


def checkpoint(folder: Path, step: int) -> None:
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / f"step={step:09d}.ckpt").touch()


def test_a_job_that_brings_nothing_to_disk_between_two_requeues_is_stopped(tmp_path):
    assert may_return(tmp_path, job(), {}) == (True, "requeue 1")  # it may have been signalled while it started
    checkpoint(tmp_path, 10)
    assert may_return(tmp_path, job(), {}) == (True, "requeue 2")
    allowed, why = may_return(tmp_path, job(), {})
    assert not allowed and "nothing has come to disk since requeue 2" in why
    assert may_return(tmp_path, job(), {FRUITLESS: "1"}) == (True, "requeue 3")
    assert not may_return(tmp_path, job(), {FRUITLESS: "1"})[0]
    checkpoint(tmp_path, 20)
    assert may_return(tmp_path, job(), {}) == (True, "requeue 4")
    assert may_return(tmp_path, job(job_id=8), {}) == (True, "requeue 1")  # submitted anew
    assert (tmp_path / RECORD).exists() and not list(tmp_path.glob("*.part"))


def staged_equals(folder: Path, index: Index) -> bool:
    copy = Index.load(folder)
    copy.verify()
    same = all(copy.read(i) == index.read(i) for i in range(0, len(index), 7))
    return (
        same
        and copy.corpus_hash == index.corpus_hash
        and [*map(copy.key, range(len(copy)))] == [*map(index.key, range(len(index)))]
    )


def test_shards_are_staged_once_and_go_on_where_a_kill_stopped_them(folder_shards, tmp_path):
    index = Index.load(folder_shards)
    folder = stage(index, tmp_path, spare_bytes=0)
    assert staged_equals(folder, index)
    copies = sorted(folder.glob("*.tar"))
    before = [path.stat().st_mtime_ns for path in copies]
    whole = copies[-1].read_bytes()
    copies[-1].rename(f"{copies[-1]}.part")
    os.truncate(f"{copies[-1]}.part", len(whole) // 2)
    stage(index, tmp_path, spare_bytes=0)
    assert copies[-1].read_bytes() == whole and [path.stat().st_mtime_ns for path in copies[:-1]] == before[:-1]
    copies[0].rename(f"{copies[0]}.part")
    Path(f"{copies[0]}.part").write_bytes(b"\0" * 1000)  # what a node that went down may leave
    assert staged_equals(stage(index, tmp_path, spare_bytes=0), index)


def test_a_glob_of_some_shards_is_staged_as_those_alone(folder_shards, tmp_path):
    index = Index.load(str(sorted(folder_shards.glob("*.tar"))[0]))
    folder = stage(index, tmp_path, spare_bytes=0)
    assert folder == place_of(index, tmp_path) and staged_equals(folder, index) and len(list(folder.glob("*.tar"))) == 1


def test_no_room_and_a_shard_that_has_changed_are_said_in_a_line(folder_shards, tmp_path):
    index = Index.load(folder_shards)
    with pytest.raises(UserError, match="GB free, and staging wants"):
        stage(index, tmp_path, spare_bytes=2**60)
    changed = tmp_path / "changed"
    shutil.copytree(folder_shards, changed)
    shard = sorted(changed.glob("*.tar"))[0]
    content = bytearray(shard.read_bytes())
    content[-2000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="is not what its index says"):
        stage(Index.load(changed), tmp_path / "disk", spare_bytes=0)
    assert not list((tmp_path / "disk").rglob(f"*{shard.name}*"))


def test_damaged_shards_that_a_run_skips_stay_where_they_are_and_cost_the_same_clips(tmp_path):
    """One shard is missing, one cut, one holds another byte: staged or not, a run trains on the same clips."""
    corpus, batches, lost = Path(ragged_corpus(tmp_path / "corpus")), [], []
    shards = sorted(corpus.glob("*.tar"))
    shards[0].unlink()
    os.truncate(shards[2], shards[2].stat().st_size // 2)
    content = bytearray(shards[4].read_bytes())
    content[1600:1900] = bytes(300)
    shards[4].write_bytes(content)
    index = Index.load(corpus, damaged_shards="skip")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        stage(index, tmp_path / "disk", spare_bytes=0)
    folder = stage(index, tmp_path / "disk", spare_bytes=0, damaged_shards="skip")
    assert [path.name[7:] for path in sorted(folder.glob("*.tar"))] == [shards[n].name for n in (1, 3, 5)]
    for place in (corpus, folder):
        data = data_of(str(place), damaged_shards="skip", max_bad_fraction=0.9)
        batches.append(digest(train_batches(data, max_steps=6)))
        lost.append((data.corpus_hash, data.bad_clips.lost, data.bad_clips.bad))
    assert batches[0] == batches[1] and lost[0] == lost[1] and len(lost[0][1]) > 10 and len(lost[0][2]) > 0


@pytest.mark.parametrize("rank, code, leaves, marked", [("0", 75, 0, True), ("1", 75, 0, False), ("0", 3, 3, False)])
def test_a_rank_that_was_asked_to_leave_ends_well_so_that_srun_kills_nobody(tmp_path, rank, code, leaves, marked):
    script, mark = tmp_path / "entry.py", tmp_path / "left"
    script.write_text(f"import sys; assert sys.argv[1:] == ['a=1']; sys.exit({code})")
    environ = os.environ | {"SLURM_PROCID": rank, "AUDIOSSL_LEFT": str(mark), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "audiossl.cluster.rank", str(script), "a=1"], env=environ)
    assert done.returncode == leaves and mark.exists() == marked


def test_the_job_script_is_bash_and_has_slurm_signal_the_ranks_before_the_end():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    directives = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--open-mode=append", "--signal=USR1@120"} <= set(directives)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--exclude=SC1091", str(SCRIPT)], check=True)


def test_nothing_of_a_job_imports_torch_before_its_ranks_start():
    program = "import sys, audiossl.cluster.job, audiossl.cluster.rank; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def test_the_ranks_take_the_next_port_where_one_is_taken():
    with socket.socket() as listener:
        listener.bind(("", job().free_port()))
        taken = listener.getsockname()[1]
        listener.listen()
        assert taken < job().free_port() < taken + 50


def test_a_job_ends_before_its_ranks_start_where_the_run_is_in_use_or_the_disk_is_no_nodes_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "audiossl.cluster", str(ROOT / "train.py"), "trainer=cpu", "name=mine"]
    shown = tmp_path / "bin" / "scontrol"  # answers for the cluster; nothing else of SLURM is reached
    shown.parent.mkdir()
    shown.write_text("#!/bin/sh\necho n1\n")
    shown.chmod(0o755)
    environ = os.environ | facts | {"PATH": f"{shown.parent}:{os.environ['PATH']}"}
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with locked(tmp_path / "runs" / "mine"):
        refuse = subprocess.run(command, env=environ, text=True, capture_output=True)
    assert refuse.returncode == 2 and f"is in use by process {os.getpid()} on" in refuse.stderr
    refuse = subprocess.run(command, env=environ | {"AUDIOSSL_STAGE": "shards"}, text=True, capture_output=True)
    assert refuse.returncode == 2 and "AUDIOSSL_STAGE=shards: give the whole path" in refuse.stderr
