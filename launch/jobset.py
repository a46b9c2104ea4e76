"""Training as a JobSet of Kubernetes on GKE: one Job per slice, one Pod per host of it, and when all of that is started again.

After jobset.sigs.k8s.io/docs/tasks/tpu_multislice and failure_policy, and of docs.cloud.google.com/kubernetes-engine/docs/how-to
tpu-multislice and cloud-storage-fuse-csi-driver-ephemeral.
"""

import json
import re
from typing import Any

from chroma_jax.utils.errors import DIVERGED, STOPPED
from launch.description import BUCKET, Description

# Exit codes after which another try would end likewise: bad input, a loss that has diverged, a program that cannot be run or is
# not there. A lost neighbour is none of these, but neither an interruption: it may have failed.
HOPELESS = (2, DIVERGED, 126, 127)
MOUNT_OPTIONS = (
    "implicit-dirs",  # folders that were made by copying objects
    "rename-dir-limit=1000000",  # a checkpoint gets its name once it is complete
    "metadata-cache:ttl-secs:0",  # a host sees at once what another has written …
    "metadata-cache:negative-ttl-secs:0",  # … also where it has just looked in vain
)


def manifest(d: Description) -> dict[str, Any]:
    """The JobSet, as Kubernetes' API has it.

    GKE tells each Pod its place by environment variables, TPU_WORKER_ID and TPU_WORKER_HOSTNAMES within a slice and MEGASCALE_*
    among slices, which it sets on seeing a JobSet that asks for TPUs; JAX reads them (jax/_src/clusters/cloud_tpu_cluster.py).
    """
    metadata: dict[str, Any] = {"name": d.run, "namespace": d.namespace}
    if d.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": d.queue}
    if d.slice.hosts > 1:  # a Job's Pods in one node pool, which is a slice, and no two Jobs in the same
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": failure_policy(d.restarts),
            "replicatedJobs": [{"name": "slice", "replicas": d.slices, "template": {"spec": job(d)}}],
        },
    }


def failure_policy(restarts: int) -> dict[str, Any]:
    """What is hopeless ends the JobSet; a training that asks for it, or whose host is taken away, is started again however often;
    any other failure is followed by another try so many times. What ended a Job is known by its message ("Container train for pod
    … failed with exit code 2 matching FailJob rule at index 0"), which JobSet compares since its version 0.10."""
    hopeless = "|".join(map(str, HOPELESS))
    return {
        "maxRestarts": restarts,
        "restartStrategy": "BlockingRecreate",  # so that never two trainings write in the run's folder
        "rules": [
            {
                "name": "hopeless",
                "action": "FailJobSet",
                "onJobFailureReasons": ["PodFailurePolicy"],
                "onJobFailureMessagePatterns": [f"failed with exit code ({hopeless}) "],
            },
            {
                "name": "interrupted",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": ["PodFailurePolicy"],
            },
        ],
    }


def job(d: Description) -> dict[str, Any]:
    """The Job of one slice. Its hosts compute together, so that it fails as a whole when one Pod does."""

    def exit_code(*codes: int) -> dict[str, Any]:
        return {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": list(codes)}}

    disrupted = {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    return {
        "parallelism": d.slice.hosts,
        "completions": d.slice.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [exit_code(*HOPELESS), exit_code(STOPPED), disrupted]},
        "template": {
            # no limits for the mount: by default it may stage 5 GiB of what is being written, less than a checkpoint
            "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"} | {f"gke-gcsfuse/{of}-limit": "0" for of in STAGING}},
            "spec": pod(d),
        },
    }


STAGING = ("cpu", "memory", "ephemeral-storage")


def pod(d: Description) -> dict[str, Any]:
    chips = {"google.com/tpu": str(d.slice.chips_per_host)}
    labels = {"accelerator": d.slice.names.gke, "topology": d.slice.shape_name}
    selector = {f"cloud.google.com/gke-tpu-{label}": value for label, value in labels.items()}
    tolerations = [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}]
    if d.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"})
    if d.reservation:
        selector["cloud.google.com/reservation-name"] = d.reservation
    container = {
        "name": "train",
        "image": d.image,
        "command": ["python", "-m", "chroma_jax"],
        "args": d.train(),
        "env": [{"name": name, "value": value} for name, value in d.environment().items()],
        "ports": [{"containerPort": port} for port in (8471, 8080)],  # among the hosts of a slice, and among slices
        # the TPU's device files and the mounted bucket belong to root
        "securityContext": {"privileged": True, "runAsUser": 0},
        "resources": {"requests": chips, "limits": chips},
        "volumeMounts": [{"name": "bucket", "mountPath": BUCKET}, {"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    attributes = {"bucketName": d.bucket_name, "mountOptions": ",".join(MOUNT_OPTIONS)}
    bucket = {"name": "bucket", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
    shared = {"name": "shared-memory", "emptyDir": {"medium": "Memory"}}  # by which readers hand over batches
    account = {"serviceAccountName": d.kubernetes_account} if d.kubernetes_account else {}
    return account | {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": d.grace_seconds,
        "nodeSelector": selector,
        "tolerations": tolerations,
        "containers": [container],
        "volumes": [bucket, shared],
    }


PLAIN = re.compile(r"[A-Za-z/][\w./-]*(:[\w./-]+)*")
WORDS = {"true", "false", "yes", "no", "on", "off", "y", "n", "null"}  # which YAML would not take for text


def to_yaml(value: Any, indent: str = "") -> str:
    """A tree of dictionaries and lists as YAML, without a library, so that jobs can be started from anywhere."""
    if isinstance(value, dict) and value:
        return "".join(f"{indent}{scalar(name)}:{nested(item, indent + '  ')}" for name, item in value.items())
    if isinstance(value, list) and value:
        return "".join(f"{indent}- {to_yaml(item, indent + '  ').lstrip(' ')}" for item in value)
    return f"{indent}{scalar(value)}\n"


def nested(value: Any, indent: str) -> str:
    return "\n" + to_yaml(value, indent) if isinstance(value, (dict, list)) and value else f" {scalar(value)}\n"


def scalar(value: Any) -> str:
    """JSON is YAML; text without doubt goes unquoted."""
    is_plain = isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in WORDS
    return value if is_plain else json.dumps(value, ensure_ascii=False)
