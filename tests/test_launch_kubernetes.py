"""JobSets: what the manifest says, that strict schemas accept it, and a real run of two pods of which one is killed.

Two things come from outside the repository, named by environment variables; without them those tests are skipped:
PARALLELOTOPE_CRDS (a folder with the CustomResourceDefinition of JobSet as YAML) and PARALLELOTOPE_JOBSET_RUN (a
program that runs a JobSet's pods as local processes).
"""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import torch
import yaml

from data_pipeline.settings import UserError, load_settings
from launch.kubernetes import dns_name, parse_secret, parse_variable, parse_volume
from pretrain.config import RunConfig
from pretrain.run_log import METRICS, read_lines
from tests.test_resume import finish, losses, state, write_config

ROOT = Path(__file__).resolve().parent.parent
SECRET_VALUE = "hunter2-the-value"
CRDS = os.environ.get("PARALLELOTOPE_CRDS")
JOBSET_RUN = os.environ.get("PARALLELOTOPE_JOBSET_RUN")
needs_crds = pytest.mark.skipif(CRDS is None, reason="PARALLELOTOPE_CRDS names no folder with the CRD of JobSet")
EVERYTHING = [
    "--nodes", "3", "--gpus-per-node", "2", "--cpu", "8", "--memory", "64Gi", "--pvc", "runs:/runs",
    "--namespace", "ml", "--pvc", "sets:/sets:ro", "--secret", "WANDB_API_KEY=wandb:api-key", "--queue", "gpus",
    "--env", "A=$(B) it's: {x}", "--max-restarts", "4", "--work-dir", "/runs/a b",
]  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "config.yaml", Path("/sets/clips"), Path("/runs/My run_1"))


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pretrain.main", "launch", "kubernetes", *arguments],
        capture_output=True, text=True, timeout=60, env=os.environ | environment, cwd=ROOT,
    )  # fmt: skip


def manifest(*arguments: str, **environment: str) -> dict[str, Any]:
    """What a dry run prints."""
    done = launch(*arguments, "--image", "registry.example/train:1", "--dry-run", **environment)
    assert done.returncode == 0, done.stderr
    (document,) = yaml.safe_load_all(done.stdout)
    assert isinstance(document, dict)
    return document


def pod(document: dict[str, Any]) -> Any:
    return document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


# What it says


def test_the_manifest_says_what_was_asked_for(config: Path) -> None:
    document = manifest(str(config), "train.chunk=2", "seed=9", *EVERYTHING)
    assert document["metadata"]["name"] == "my-run-1"
    assert document["metadata"]["namespace"] == "ml"
    assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert document["spec"]["failurePolicy"]["maxRestarts"] == 4
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["backoffLimit"], job["completionMode"]) == (3, 3, 0, "Indexed")
    (container,) = pod(document)["containers"]
    assert container["resources"] == {
        "requests": {"cpu": "8", "memory": "64Gi"}, "limits": {"memory": "64Gi", "nvidia.com/gpu": "2"},
    }  # fmt: skip
    command = container["command"]
    assert command[command.index("--master-host") + 1] == "my-run-1-node-0-0.my-run-1"
    assert command[command.index("--nodes") + 1] == "3"
    assert command[command.index("--ranks-per-node") + 1] == "2"
    assert container["workingDir"] == "/runs/a b"
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert mounts == {"/dev/shm": False, "/runs": False, "/sets": True}
    env = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert env["A"] == "$$(B) it's: {x}"  # Kubernetes turns $$ into $ and expands nothing
    assert env["OMP_NUM_THREADS"] == "4"  # 8 cores, 2 ranks
    assert "DS_ACCELERATOR" not in env
    without = manifest(str(config), "--pvc", "runs:/runs")
    assert {"name": "DS_ACCELERATOR", "value": "cpu"} in pod(without)["containers"][0]["env"]


def test_stops_with_a_checkpoint_and_disruptions_do_not_count_as_restarts(config: Path) -> None:
    document = manifest(str(config), *EVERYTHING)
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    by_code, by_condition = job["podFailurePolicy"]["rules"]
    assert by_code["onExitCodes"]["values"] == [75]
    assert by_code["onExitCodes"]["containerName"] == pod(document)["containers"][0]["name"]
    assert by_condition["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert {by_code["action"], by_condition["action"]} == {"FailJob"}
    (rule,) = document["spec"]["failurePolicy"]["rules"]
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["name"]


def test_the_config_in_the_manifest_is_the_resolved_one(config: Path, tmp_path: Path) -> None:
    """The pod's own command line, run by a shell with a stand-in that keeps the config it is given."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "parallelotope"
    stand_in.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$@" > "$KEPT/arguments"\nfor last; do :; done\ncp "$last" "$KEPT/c"\n'
    )
    stand_in.chmod(0o755)
    overrides = ['data.train.path="/sets/it\'s $HOME `x` é"', "optimizer.lr=1e-4"]
    (container,) = pod(manifest(str(config), *overrides, *EVERYTHING))["containers"]
    given = [argument.replace("$$", "$") for argument in container["command"]]  # as Kubernetes does
    env = {variable["name"]: variable.get("value", "").replace("$$", "$") for variable in container["env"]}
    env |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "KEPT": str(tmp_path)}
    subprocess.run(given, check=True, env=env)
    assert load_settings(RunConfig, tmp_path / "c") == load_settings(RunConfig, config, overrides)
    assert (tmp_path / "arguments").read_text().splitlines()[:2] == ["launch", "node"]

    missing = subprocess.run(given, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert missing.returncode == 127
    assert "no 'parallelotope' on the PATH of" in missing.stderr


def test_no_value_of_a_secret_is_in_a_manifest(config: Path) -> None:
    document = manifest(str(config), *EVERYTHING, WANDB_API_KEY=SECRET_VALUE)
    assert SECRET_VALUE not in json.dumps(document)
    reference = {"secretKeyRef": {"name": "wandb", "key": "api-key"}}
    assert {"name": "WANDB_API_KEY", "valueFrom": reference} in pod(document)["containers"][0]["env"]
    for mistake in (["--env", f"HF_TOKEN={SECRET_VALUE}"], ["--secret", f"HF_TOKEN={SECRET_VALUE}"]):
        done = launch(str(config), "--image", "i", "--pvc", "runs:/runs", "--dry-run", *mistake)
        assert done.returncode == 2
        assert "expected VARIABLE=SECRET:KEY" in done.stderr or "use --secret HF_TOKEN=SECRET:KEY" in done.stderr
        assert SECRET_VALUE not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "4"], "train.global_batch 6 is not divisible by 4 ranks; expected one of 1, 2, 3, 6 ranks"),
        ([], "run_dir /runs/My run_1: in no volume that can be written: checkpoints would be lost"),
        (["--pvc", "runs:/runs:ro"], "in no volume that can be written"),
        (["--pvc", "runs:/run"], "in no volume that can be written (/run)"),
        (["run_dir=runs/x", "--pvc", "runs:/runs"], "run_dir runs/x: relative"),
        (["--pvc", "runs"], "--pvc 'runs': expected CLAIM:/FOLDER"),
        (["--pvc", "runs:/runs", "--memory", "64GB"], "--memory '64GB': expected a Kubernetes quantity"),
        (["--pvc", "runs:/runs", "--name", "My run"], "as in 'my-run'"),
        (["--pvc", "runs:/runs", "--env", "1A=2"], "--env '1A': expected NAME=VALUE"),
        (["--pvc", "runs:/runs", "train.chnk=2"], "train.chnk: unknown key; did you mean 'chunk'?"),
    ],
)
def test_mistakes_are_one_line(config: Path, arguments: list[str], said: str) -> None:
    done = launch(str(config), "--image", "i", "--dry-run", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_data_that_is_here_is_checked_and_other_data_is_said(tmp_path: Path, small_dataset: Path, config: Path) -> None:
    here = write_config(tmp_path / "here.yaml", small_dataset, Path("/runs/x"))
    done = launch(str(here), "data.train.split=trian", "--image", "i", "--pvc", "runs:/runs", "--dry-run")
    assert done.returncode == 2
    assert "did you mean 'train'?" in done.stderr
    done = launch(str(config), "--image", "i", "--pvc", "runs:/runs", "--dry-run")
    assert done.stderr == "not on this machine, so checked by the pods when they start: /sets/clips\n"


def test_kubectl_gets_the_manifest_and_its_refusal_is_one_line(config: Path, tmp_path: Path) -> None:
    arguments = [str(config), "--image", "i", "--pvc", "runs:/runs"]
    printed = launch(*arguments, "--dry-run").stdout
    done = launch(*arguments, PATH=str(tmp_path / "empty"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: launch kubernetes: no kubectl on PATH" in done.stderr
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f"#!/bin/sh\necho \"$@\" > '{tmp_path}/arguments'\ncat > '{tmp_path}/manifest'\n")
    kubectl.chmod(0o755)
    done = launch(*arguments, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (done.returncode, done.stdout) == (0, "my-run-1\n")
    assert "stop for good: kubectl delete jobset my-run-1" in done.stderr
    assert (tmp_path / "arguments").read_text() == "create -f -\n"
    assert (tmp_path / "manifest").read_text() == printed
    kubectl.write_text("#!/bin/sh\necho 'Error from server (AlreadyExists): jobsets \"my-run-1\"' >&2\nexit 1\n")
    done = launch(*arguments, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert "'kubectl delete jobset NAME' first (the run continues from its checkpoint)" in done.stderr.splitlines()[-1]


def test_names_and_places_are_read() -> None:
    assert [dns_name(text) for text in ("My run_3", "--", "x" * 60)] == ["my-run-3", "run", "x" * 40]
    assert parse_volume("a.b:/x/y/").mount == "/x/y"
    assert parse_variable("A=b=c") == ("A", "b=c")
    assert parse_secret("A=my.secret:k_1").key == "k_1"
    for parse, text in ((parse_volume, "a:relative"), (parse_volume, "A_b:/x"), (parse_secret, "A=b")):
        with pytest.raises(UserError):
            parse(text)


# Strict schemas


def job_of(document: dict[str, Any]) -> dict[str, Any]:
    """The Job that a JobSet makes, as a document of its own."""
    template = document["spec"]["replicatedJobs"][0]["template"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **template}


def as_json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema of Kubernetes as JSON Schema; fields that it does not name are refused."""
    plain = {key: schema[key] for key in ("type", "enum", "pattern", "required", "minimum", "maximum") if key in schema}
    plain |= {key: schema[key] for key in ("maxItems", "minItems", "maxLength", "minLength") if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        plain["type"] = ["integer", "string"]
    if "properties" in schema:
        plain["properties"] = {name: as_json_schema(part) for name, part in schema["properties"].items()}
        plain["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    if "additionalProperties" in schema:
        plain["additionalProperties"] = as_json_schema(schema["additionalProperties"])
    if "items" in schema:
        plain["items"] = as_json_schema(schema["items"])
    return plain


@pytest.fixture(scope="module")
def jobset_schema() -> dict[str, Any]:
    definition = yaml.load((Path(str(CRDS)) / "jobset.x-k8s.io_jobsets.yaml").read_text(), Loader=yaml.CSafeLoader)
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1alpha2"]
    schema = as_json_schema(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


MUTATIONS: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("unknown field of the pod", lambda d: pod(d).update(restartPolcy="Never")),
    ("unknown field of a container", lambda d: pod(d)["containers"][0].update(imagePullPolice="Always")),
    ("a number for a text", lambda d: pod(d)["containers"][0]["env"][1].update(value=1)),
    ("a text for a number", lambda d: pod(d).update(terminationGracePeriodSeconds="300")),
    ("no name of a container", lambda d: pod(d)["containers"][0].pop("name")),
    ("no action", lambda d: job_of(d)["spec"]["podFailurePolicy"]["rules"][0].pop("action")),
]
JOBSET_MUTATIONS: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("unknown field of the JobSet", lambda d: d["spec"].update(maxRestarts=3)),
    ("a rule without a name", lambda d: d["spec"]["failurePolicy"]["rules"][0].pop("name")),
    ("an action that is none", lambda d: d["spec"]["failurePolicy"]["rules"][0].update(action="Restart")),
]


def test_kubernetes_takes_the_job(config: Path) -> None:
    for arguments in (EVERYTHING, ["--pvc", "runs:/runs"]):
        document = manifest(str(config), *arguments)
        kubernetes_validate.validate(job_of(document), "1.34", strict=True)
    for _, mutate in MUTATIONS:
        mutant = copy.deepcopy(document)
        mutate(mutant)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(job_of(mutant), "1.34", strict=True)


@needs_crds
def test_the_definition_of_jobset_takes_the_manifest(config: Path, jobset_schema: dict[str, Any]) -> None:
    for arguments in (EVERYTHING, ["--pvc", "runs:/runs"]):
        document = manifest(str(config), *arguments)
        jsonschema.validate(document, jobset_schema)
    for _, mutate in MUTATIONS + JOBSET_MUTATIONS:
        mutant = copy.deepcopy(document)
        mutate(mutant)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(mutant, jobset_schema)


# Pods that run


def launcher_of_pod(index: int, name: str) -> int:
    """Process id of the first process in a pod of the first life."""
    wanted = {f"JOB_COMPLETION_INDEX={index}".encode(), f"PARALLELOTOPE_LIFE={name}.0".encode()}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if wanted <= set((process / "environ").read_bytes().split(b"\0")):
                namespaces = (process / "status").read_text().split("NSpid:")[1].splitlines()[0].split()
                found += [int(process.name)] if namespaces[-1] == "1" and len(namespaces) > 1 else []
        except (OSError, IndexError):
            continue
    assert len(found) == 1, found
    return found[0]


@pytest.mark.slow
@pytest.mark.skipif(JOBSET_RUN is None, reason="PARALLELOTOPE_JOBSET_RUN names no program that runs a JobSet locally")
def test_two_pods_one_killed_give_the_run_of_two_local_ranks(tmp_path: Path, small_dataset: Path) -> None:
    steps = {"schedule": {"num_steps": 40}, "checkpoint": {"every_steps": 5, "keep_last": 1}}
    volume, extensions = tmp_path / "volume", os.environ.get("TORCH_EXTENSIONS_DIR")
    volume.mkdir()
    run, name = volume / "pods", f"run-{os.getpid()}"
    config = write_config(tmp_path / "pods.yaml", small_dataset, run, **steps)
    env = ["OMP_NUM_THREADS=1", *([f"TORCH_EXTENSIONS_DIR={extensions}"] if extensions else [])]
    arguments = [part for text in env for part in ("--env", text)]
    document = manifest(str(config), "--nodes", "2", "--pvc", f"runs:{volume}", "--name", name, *arguments)
    (tmp_path / "manifest.yaml").write_text(yaml.safe_dump(document))
    shares = [volume, small_dataset, ROOT, Path(sys.prefix), *([Path(extensions)] if extensions else [])]
    cluster = subprocess.Popen(
        [str(JOBSET_RUN), str(tmp_path / "manifest.yaml"), "--timeout", "240", "--logs", str(tmp_path / "logs"),
         *(part for share in shares for part in ("--share", str(share)))],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"},
    )  # fmt: skip
    deadline_s = time.monotonic() + 200
    while not any(record["step"] >= 12 for record in read_lines(run / METRICS)):
        assert cluster.poll() is None, cluster.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    os.kill(launcher_of_pod(1, name), signal.SIGKILL)
    said = cluster.communicate(timeout=240)[0]
    log = (tmp_path / "logs" / f"{name}-node-0-0.log").read_text()
    assert cluster.returncode == 0, said + log
    assert "completed after 1 restarts" in said
    assert "resumed from" in log
    assert sorted(path.name for path in (run / "logs").iterdir()) == [f"{name}.0", f"{name}.1"]

    local = tmp_path / "local"
    finish(write_config(tmp_path / "local.yaml", small_dataset, local, **steps), ranks=2)
    assert [record["step"] for record in losses(run)] == list(range(1, 41))
    assert losses(run) == losses(local)
    expected = state(local)
    for key, tensor in state(run).items():
        assert torch.equal(tensor, expected[key]), key
