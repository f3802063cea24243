"""A training run as a JobSet (jobset.x-k8s.io/v1alpha2): the manifest is a pure function of `KubernetesJob`.

One Indexed Job with a pod a node; each pod starts its ranks with `parallelotope launch node`. A pod that ends with a
failure ends them all, and the JobSet starts them anew, where they resume:

    code 75 (stopped with a checkpoint) or a disruption (preemption, eviction, drained node)    does not count
    any other failure                                                                            at most max_restarts
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

import yaml

from data_pipeline.settings import UserError
from launch.delivery import VARIABLE as CONFIG
from launch.failures import LIFE
from launch.plan import EXIT_RUN_AGAIN

GROUP = "node"  # of the replicated job: the pods are NAME-node-0-0, NAME-node-0-1, ...
CONTAINER = "trainer"
MASTER_PORT = 20_000  # every pod has its own network: no other job listens there
MAX_NAME = 40  # a pod's name, NAME-node-0-INDEX-RANDOM, must be a DNS label of at most 63 characters
NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|[kMGTP]i?)?")
OBJECT = r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?"
SECRETIVE = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "API_KEY", "ACCESS_KEY", "CREDENTIAL")


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A PersistentVolumeClaim in every pod."""

    claim: str
    mount: str
    read_only: bool = False


@dataclass(frozen=True, kw_only=True)
class SecretVariable:
    """An environment variable whose value is a key of a Secret; the value itself is never seen here."""

    variable: str
    secret: str
    key: str


@dataclass(frozen=True, kw_only=True)
class KubernetesJob:
    """Everything a manifest says. `command` starts the ranks of one pod; it finds `config`, a YAML, in `VARIABLE`."""

    name: str
    image: str
    config: str
    command: tuple[str, ...]
    num_nodes: int
    ranks_per_node: int = 1
    gpus_per_node: int | None = None
    cpu: str | None = None  # of a pod, as Kubernetes takes it: 8, 500m
    memory: str | None = None  # of a pod: 64Gi
    volumes: tuple[Volume, ...] = ()
    secrets: tuple[SecretVariable, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    work_dir: str | None = None  # where relative paths of the config start; None: the image's own
    namespace: str | None = None  # None: the one of kubectl's context
    queue: str | None = None  # of Kueue
    max_restarts: int = 10
    grace_s: int = 300  # from SIGTERM to SIGKILL: a step and a checkpoint have to fit


def node_command(name: str, num_nodes: int, ranks_per_node: int) -> tuple[str, ...]:
    """What a pod runs; its completion index says which node it is."""
    master = f"{name}-{GROUP}-0-0.{name}"  # the host name that stays, whatever becomes of the pod
    places = ["--nodes", str(num_nodes), "--ranks-per-node", str(ranks_per_node)]
    return ("parallelotope", "launch", "node", *places, "--master-host", master, "--master-port", str(MASTER_PORT))


def jobset(job: KubernetesJob) -> dict[str, Any]:
    """The manifest as data."""
    labels = {"app.kubernetes.io/name": "parallelotope"}
    if job.queue is not None:
        labels["kueue.x-k8s.io/queue-name"] = job.queue
    metadata: dict[str, Any] = {"name": job.name, "labels": labels}
    if job.namespace is not None:
        metadata["namespace"] = job.namespace
    uncounted = {
        "name": "stopped_with_a_checkpoint_or_disrupted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],  # the rules of _job_spec
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": job.max_restarts, "rules": [uncounted]},
            "replicatedJobs": [{"name": GROUP, "replicas": 1, "template": {"spec": _job_spec(job)}}],
        },
    }


def _job_spec(job: KubernetesJob) -> dict[str, Any]:
    asked = {"containerName": CONTAINER, "operator": "In", "values": [EXIT_RUN_AGAIN]}
    return {
        "completionMode": "Indexed",
        "completions": job.num_nodes,
        "parallelism": job.num_nodes,
        "backoffLimit": 0,  # one pod started anew would wait for ranks that have left
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": asked},
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": _pod_spec(job)},
    }


def _pod_spec(job: KubernetesJob) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [
        # What containers get is 64 MB; decoding processes and DeepSpeed pass tensors through it.
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}}
    ]
    mounts: list[dict[str, Any]] = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    for number, volume in enumerate(job.volumes):
        claim: dict[str, Any] = {"claimName": volume.claim}
        mount: dict[str, Any] = {"name": f"volume-{number}", "mountPath": volume.mount}
        if volume.read_only:
            claim["readOnly"] = mount["readOnly"] = True
        volumes.append({"name": f"volume-{number}", "persistentVolumeClaim": claim})
        mounts.append(mount)
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": job.image,
        "command": [_literal(argument) for argument in job.command],
        "env": _environment(job),
        "volumeMounts": mounts,
    }
    if job.work_dir is not None:
        container["workingDir"] = job.work_dir
    resources = _resources(job)
    if resources:
        container["resources"] = resources
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_s,
        "containers": [container],
        "volumes": volumes,
    }


def _environment(job: KubernetesJob) -> list[dict[str, Any]]:
    """Variables of the container; those that a later one refers to come first."""
    restarts = {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"}}
    values = {"PYTHONUNBUFFERED": "1"}
    if job.gpus_per_node is None:
        values["DS_ACCELERATOR"] = "cpu"
    if job.cpu is not None:
        values["OMP_NUM_THREADS"] = str(max(1, int(_cores(job.cpu)) // job.ranks_per_node))  # not the machine's cores
    values |= dict(job.env)
    return [
        {"name": "JOBSET_RESTART_ATTEMPT", "valueFrom": restarts},
        {"name": LIFE, "value": f"{job.name}.$(JOBSET_RESTART_ATTEMPT)"},
        {"name": CONFIG, "value": _literal(job.config)},
        *({"name": name, "value": _literal(value)} for name, value in values.items()),
        *(
            {"name": s.variable, "valueFrom": {"secretKeyRef": {"name": s.secret, "key": s.key}}}
            for s in job.secrets
        ),
    ]  # fmt: skip


def _resources(job: KubernetesJob) -> dict[str, dict[str, str]]:
    requests = {name: value for name, value in (("cpu", job.cpu), ("memory", job.memory)) if value is not None}
    limits = {"memory": job.memory} if job.memory is not None else {}
    if job.gpus_per_node is not None:
        limits["nvidia.com/gpu"] = str(job.gpus_per_node)  # requests of devices are their limits
    return {kind: values for kind, values in (("requests", requests), ("limits", limits)) if values}


def _cores(quantity: str) -> float:
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


def _literal(text: str) -> str:
    """`text` as Kubernetes takes it where it would expand $(NAME)."""
    return text.replace("$", "$$")


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as they are read."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def render(job: KubernetesJob) -> str:
    """The manifest as YAML."""
    return yaml.dump(jobset(job), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def dns_name(text: str) -> str:
    """The nearest name that a JobSet can have: "My run_3" -> "my-run-3"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:MAX_NAME].strip("-") or "run"


def check_name(name: str) -> str:
    """`name`, when a JobSet can have it.

    Raises:
        UserError: it cannot.
    """
    if not NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise UserError(
            f"--name '{name}': expected at most {MAX_NAME} lower-case letters, digits and '-', as in '{dns_name(name)}'"
        )
    return name


def check_quantity(option: str, value: str | None) -> str | None:
    """`value`, when Kubernetes takes it as an amount of cores or bytes.

    Raises:
        UserError: it does not.
    """
    if value is not None and not QUANTITY.fullmatch(value):
        raise UserError(f"{option} '{value}': expected a Kubernetes quantity, as in --cpu 8 or --memory 64Gi")
    return value


def parse_volume(text: str) -> Volume:
    """ "claim:/data" or "claim:/data:ro".

    Raises:
        UserError: it is neither.
    """
    found = re.fullmatch(rf"({OBJECT}):(/[^:]+?)/*(:ro)?", text)
    if found is None:
        raise UserError(f"--pvc '{text}': expected CLAIM:/FOLDER or CLAIM:/FOLDER:ro, as in --pvc datasets:/data:ro")
    return Volume(claim=found[1], mount=found[3], read_only=found[4] is not None)


def parse_secret(text: str) -> SecretVariable:
    """ "WANDB_API_KEY=wandb:key".

    Raises:
        UserError: it is not VARIABLE=SECRET:KEY. What was given is not repeated: it may be the value.
    """
    found = re.fullmatch(rf"({VARIABLE.pattern})=({OBJECT}):([-._a-zA-Z0-9]+)", text)
    if found is None:
        raise UserError("--secret: expected VARIABLE=SECRET:KEY, the names of a Secret and of a key in it, no value")
    return SecretVariable(variable=found[1], secret=found[2], key=found[4])


def parse_variable(text: str) -> tuple[str, str]:
    """ "NCCL_DEBUG=INFO" -> ("NCCL_DEBUG", "INFO").

    Raises:
        UserError: no NAME=VALUE, or a name that looks like a secret's, which a manifest must not hold.
    """
    name, equals, value = text.partition("=")
    if not equals or not VARIABLE.fullmatch(name):
        raise UserError(f"--env '{name}': expected NAME=VALUE, as in --env NCCL_DEBUG=INFO")
    if any(word in name.upper() for word in SECRETIVE):
        raise UserError(f"--env {name}: values of secrets have no place in a manifest; use --secret {name}=SECRET:KEY")
    return name, value


def create(manifest: str) -> None:
    """Give a manifest to kubectl, with its contexts and its authentication.

    Raises:
        UserError: no kubectl, or the cluster refuses.
    """
    if shutil.which("kubectl") is None:
        raise UserError("launch kubernetes: no kubectl on PATH; expected it, or --dry-run to print the manifest")
    done = subprocess.run(["kubectl", "create", "-f", "-"], input=manifest, capture_output=True, text=True)
    if done.returncode != 0:
        words = " ".join(done.stderr.split())
        hint = ""
        if "AlreadyExists" in words:
            hint = "; 'kubectl delete jobset NAME' first (the run continues from its checkpoint), or choose a --name"
        raise UserError(f"launch kubernetes: kubectl refuses: {words}{hint}")
