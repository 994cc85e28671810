"""pytorchjob.yaml against what Kubeflow's training operator (v1) accepts, and against this package's own settings."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml

from pesc.recipe import load_recipe

PATH = Path(__file__).resolve().parents[2] / "deployments" / "kubernetes" / "pytorchjob.yaml"
JOB = yaml.safe_load(PATH.read_text())
WORKER = JOB["spec"]["pytorchReplicaSpecs"]["Worker"]
POD = WORKER["template"]["spec"]
CONTAINER = POD["containers"][0]

COUNT = {"type": "integer", "minimum": 0}


def closed(properties: dict, *required: str) -> dict:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


RUN_POLICY = {
    "cleanPodPolicy": {"enum": ["None", "Running", "All"]}, "ttlSecondsAfterFinished": COUNT, "activeDeadlineSeconds": COUNT,
    "backoffLimit": COUNT, "schedulingPolicy": {"type": "object"}, "suspend": {"type": "boolean"},
}  # fmt: skip
ELASTIC = {
    "minReplicas": COUNT, "maxReplicas": COUNT, "maxRestarts": COUNT, "rdzvBackend": {"enum": ["c10d", "etcd", "etcd-v2"]}, "rdzvPort": COUNT,
    "rdzvHost": {"type": "string"}, "rdzvId": {"type": "string"}, "rdzvConf": {"type": "array"}, "standalone": {"type": "boolean"},
    "metrics": {"type": "array"},
}  # fmt: skip
REPLICAS = closed(
    {
        "replicas": COUNT,
        "restartPolicy": {"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
        "template": {"type": "object", "required": ["spec"]},
    },
    "template",
)
SCHEMA = closed(
    {
        "apiVersion": {"const": "kubeflow.org/v1"},
        "kind": {"const": "PyTorchJob"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": closed(
            {
                "elasticPolicy": closed(ELASTIC),
                "nprocPerNode": {"type": "string", "pattern": r"^(auto|cpu|gpu|\d+)$"},
                "runPolicy": closed(RUN_POLICY),
                "pytorchReplicaSpecs": closed({"Master": REPLICAS, "Worker": REPLICAS}),
            },
            "pytorchReplicaSpecs",
        ),
    },
    "apiVersion",
    "kind",
    "metadata",
    "spec",
)


def test_the_operator_accepts_it():
    jsonschema.validate(JOB, SCHEMA)
    wrong = {**JOB, "spec": {**JOB["spec"], "nprocPerNode": 8}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, SCHEMA)
    assert [container["name"] for container in POD["containers"]] == ["pytorch"]  # the operator sets the PET_ variables of this one alone
    mounts = {mount["name"] for mount in CONTAINER["volumeMounts"]}
    assert mounts == {volume["name"] for volume in POD["volumes"]}


def test_the_numbers_agree():
    elastic = JOB["spec"]["elasticPolicy"]
    assert WORKER["replicas"] == elastic["minReplicas"] == elastic["maxReplicas"] == run().execution.num_nodes
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == int(JOB["spec"]["nprocPerNode"])


def test_the_command_is_one_that_this_package_takes_and_pods_keep_their_name_and_store():
    execution = run().execution
    assert (execution.master, execution.address) == ("pesc-train-worker-0:23456", "pesc-train-worker-1")
    environment = {variable["name"]: variable for variable in CONTAINER["env"]}
    assert environment["POD_NAME"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
    assert "$(POD_NAME)" in environment["PESC_STORE"]["value"]


def run():
    """The recipe as the container's shell would give it, on worker 1."""
    told = {"PET_RDZV_ENDPOINT": "pesc-train-worker-0:23456", "POD_NAME": "pesc-train-worker-1"}
    words = shlex.split(re.sub(r"\$(\w+)", lambda match: told[match[1]], CONTAINER["args"][0]))
    assert words[:3] == ["exec", "pesc", "run"]
    assert words[-2:] == ["--until", "train"]
    return load_recipe(words[3], words[4:-2])
