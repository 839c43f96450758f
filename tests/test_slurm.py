"""Everything about the cluster files that can be seen without a cluster."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from eagle_moe.checkpoint import read_complete
from tests.tiny_run import make_world
from train.recipe import load_recipe
from train.run import main as run_main
from train.slurm.submit import SCRIPT, commands, main, submit

REPOSITORY = Path(__file__).parents[1]
RECIPE = "configs/recipes/eagle-x5-vicuna-7b.yaml"

SRUN = """#!/usr/bin/env bash
# Two nodes on this machine: the command twice; signals are handed on, the worst status is ours.
while [[ $1 == --* ]]; do shift; done
"$@" & first=$!
"$@" & second=$!
trap 'kill -TERM $first $second' TERM
status=0
for node in $first $second; do
  wait $node || status=$?
  while kill -0 $node 2>/dev/null; do wait $node && status=0 || status=$?; done
done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf 'localhost\\nlocalhost\\n'; else echo "$@" >>"$CALLS"; fi
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes, with stand-ins for what SLURM has."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "PYTHON": sys.executable,
        "NPROC": "1",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_ON_NODE": "1",
    }


def start(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_job_trains_on_two_nodes_saves_when_its_time_ends_and_goes_on_when_requeued(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    recipe = make_world(tmp_path)
    align = recipe["stages"]["align"]
    align |= {"init_from": [], "args": {**align["args"], "max_steps": 30}}
    recipe["stages"] = {"align": align}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    run, calls = tmp_path / "run", Path(cluster["CALLS"])

    job = start(cluster, str(path), "align", "-", "stages.align.batch_size=4")
    deadline = time.monotonic() + 120
    while not list(run.glob("unfinished/align/checkpoint-*")):
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()[0]
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=120)
    assert job.returncode != 0, said
    assert "align: stopped by a signal; requeued" in said
    assert calls.read_text().split() == ["requeue", cluster["SLURM_JOB_ID"]]
    assert read_complete(run / "align") is None

    again = {**cluster, "SLURM_RESTART_COUNT": "1"}
    job = start(again, str(path), "align", "-", "stages.align.batch_size=4")
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0, said
    assert "continues from" in said
    assert read_complete(run / "align") is not None
    assert len(calls.read_text().splitlines()) == 1  # not requeued again


def test_a_job_that_fails_by_itself_is_not_requeued(cluster: dict[str, str]) -> None:
    job = start({**cluster, "PYTHON": "false"}, RECIPE, "sft", "-")
    job.communicate(timeout=60)
    assert job.returncode == 1
    assert not Path(cluster["CALLS"]).exists()


def test_a_task_of_an_array_takes_its_expert(cluster: dict[str, str], tmp_path: Path) -> None:
    echo = tmp_path / "python"
    echo.write_text('#!/usr/bin/env bash\necho "$@"\n')
    echo.chmod(0o755)
    told = {**cluster, "PYTHON": str(echo), "SLURM_ARRAY_TASK_ID": "1"}
    said, _ = start(told, RECIPE, "pre_align", "clip,sam", "seed=1").communicate(timeout=60)
    assert f"-m train.run {RECIPE} --stage pre_align --expert sam seed=1" in said
    del told["SLURM_ARRAY_TASK_ID"]
    said, _ = start(told, RECIPE, "pre_align", "clip,sam").communicate(timeout=60)
    assert "give --array" in said


def test_stages_wait_for_those_that_they_start_from() -> None:
    recipe = load_recipe(RECIPE)
    queue = commands(recipe, [RECIPE, "seed=1"], nodes=4, options=["--partition=gpu"])
    assert {name: after for name, (_, after) in queue.items()} == {
        "pre_align": [],
        "align": ["pre_align"],
        "sft": ["align"],
    }
    command, _ = queue["pre_align"]
    assert "--array=0-4" in command and "--nodes=4" in command and "--partition=gpu" in command
    assert command[-4:] == [RECIPE, "pre_align", ",".join(recipe.experts), "seed=1"]
    assert queue["sft"][0][-3:] == ["sft", "-", "seed=1"]
    assert commands(recipe, [RECIPE], only="sft")["sft"][1] == []


def test_submitting_hands_on_the_numbers_of_jobs(
    cluster: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text('#!/usr/bin/env bash\necho "$@" >>"$CALLS"; wc -l <"$CALLS"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", cluster["PATH"])
    monkeypatch.setenv("CALLS", cluster["CALLS"])
    queue = commands(load_recipe(RECIPE), [RECIPE])
    assert submit(queue) == {"pre_align": "1", "align": "2", "sft": "3"}
    first, second, third = Path(cluster["CALLS"]).read_text().splitlines()
    assert "--dependency" not in first
    assert "--dependency=afterok:1 --kill-on-invalid-dep=yes" in second
    assert "--dependency=afterok:2 --kill-on-invalid-dep=yes" in third


def test_the_command_line_shows_what_it_would_queue(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([RECIPE, "--nodes", "2", "--dry-run", "--", "--account=me"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("--account=me" in line for line in lines)
    assert lines[1].endswith("# after pre_align")
    assert main([RECIPE, "--stage", "sfd"]) == 2
    assert 'Did you mean "sft"?' in capsys.readouterr().err


def test_every_option_that_the_files_give_exists() -> None:
    """Of torchrun, and of the run itself; bash reads the script without complaint."""
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    known = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True
    ).stdout
    text = SCRIPT.read_text()
    launch = text[text.index("torch.distributed.run") : text.index('"${command[@]}"')]
    job = kubernetes_job()["spec"]["template"]["spec"]["containers"][0]["command"]
    until = job.index("-m", job.index("torch.distributed.run"))
    options = re.findall(r"--[a-z-]+", launch + " ".join(job[:until]))
    assert len(options) >= 10
    assert [option for option in options if option not in known] == []
    with pytest.raises(SystemExit):
        run_main(["--help"])


def kubernetes_job() -> dict[str, Any]:
    return list(yaml.safe_load_all((REPOSITORY / "train/kubernetes/job.yaml").read_text()))[1]


def test_the_kubernetes_job_fits_its_service_and_names_a_stage_that_exists() -> None:
    text = (REPOSITORY / "train/kubernetes/job.yaml").read_text()
    service, job = yaml.safe_load_all(text)
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": name}
    command = pod["containers"][0]["command"]
    assert f"--nnodes={spec['completions']}" in command
    assert spec["completions"] == spec["parallelism"]
    assert f"--master-addr={name}-0.{service['metadata']['name']}" in command
    recipe, stage = command[-2:]
    assert stage.removeprefix("--stage=") in load_recipe(REPOSITORY / recipe).stages
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes
