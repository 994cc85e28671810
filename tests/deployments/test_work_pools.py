"""The base job templates with Prefect's own worker classes: every field is theirs, and what they make of it is what Docker and Kubernetes take.

No container and no pod is started: the arguments that docker-py would send, and the Job that the worker would create, are looked at.
"""

from __future__ import annotations

import asyncio
import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import jsonschema
import pytest
from docker.models.containers import _create_container_args
from prefect.client.schemas.objects import FlowRun
from prefect.server.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.utilities.schema_tools.validation import is_valid_schema
from prefect.workers.process import ProcessWorker

from deployments.fleet import load_fleet
from deployments.pools import TEMPLATES, base_job_template

TYPES = ["process", "docker", "kubernetes", "slurm"]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("PESC_HOME", "/srv/pesc")
    monkeypatch.setenv("PESC_STORE", "/srv/store")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        yield


def worker_class(kind):
    """Prefect's worker of the type; skips where its package is missing."""
    if kind in ("process", "slurm"):
        return ProcessWorker
    module = pytest.importorskip(f"prefect_{kind}.worker")
    return getattr(module, f"{kind.title()}Worker")


def template(kind, pool="gpu"):
    """The template that bootstrap gives to the pool."""
    return base_job_template(pool, load_fleet(pool_type=kind).pools[pool], 180)


def configured(kind, pool="gpu", **values):
    """What the worker makes of the template for a run with these job variables."""
    base = template(kind, pool)
    jsonschema.validate(values, {**base["variables"], "required": []})  # as the server does: what has a default need not be told
    configuration_class = worker_class(kind).job_configuration
    nobody = SimpleNamespace(_closed=False)  # no block is asked for
    configuration = asyncio.run(configuration_class.from_template_and_values(base, values, client=nobody))
    configuration.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="train[pesc] demo"))
    return configuration


def test_there_is_a_template_for_each_type():
    assert sorted(path.stem for path in TEMPLATES.glob("*.json")) == sorted(TYPES)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("pool", ["cpu", "gpu"])
def test_the_server_takes_it_and_each_variable_says_what_it_is(kind, pool):
    base = template(kind, pool)
    WorkPoolCreate(name=pool, type="process", base_job_template=base)
    is_valid_schema(base["variables"])
    for name, variable in base["variables"]["properties"].items():
        assert variable["title"], name
        assert variable["description"].endswith((".", ":")) or "." in variable["description"], name
        if "default" in variable:
            jsonschema.validate(variable["default"], {**variable, "definitions": base["variables"].get("definitions", {})})
    lost = copy.deepcopy(base)
    lost["job_configuration"]["labels"] = "{{ nobody }}"
    with pytest.raises(ValueError, match="nobody"):
        WorkPoolCreate(name=pool, type="process", base_job_template=lost)


@pytest.mark.parametrize("kind", TYPES)
def test_every_field_is_one_of_the_workers_and_every_variable_is_used(kind):
    base = template(kind)
    assert set(base["job_configuration"]) <= set(worker_class(kind).job_configuration.model_fields)
    told = json.dumps(base["job_configuration"])
    unused = {name for name in base["variables"]["properties"] if f"{{{{ {name} }}}}" not in told}
    assert unused == {"env"} - ({"env"} if "{{ env }}" in told else set())


@pytest.mark.parametrize("kind", ["process", "docker", "kubernetes"])
def test_variables_that_prefect_has_too_mean_the_same(kind):
    theirs = worker_class(kind).get_default_base_job_template()["variables"]
    ours = template(kind)["variables"]
    shared = set(ours["properties"]) & set(theirs["properties"])
    assert shared >= {"name", "env", "labels", "command", "stream_output"}
    for name in shared:
        if "default" in ours["properties"][name]:
            jsonschema.validate(ours["properties"][name]["default"], {**theirs["properties"][name], **definitions(theirs)})
    for name, definition in ours.get("definitions", {}).items():
        real = definitions(theirs)["definitions"][name]
        assert definition["block_type_slug"] == real["block_type_slug"]
        assert set(definition["properties"]) == set(real["properties"])
        assert definition["required"] == real["required"]


def definitions(schema):
    return {"definitions": schema.get("definitions", schema.get("$defs", {}))}


def test_a_process_sees_the_gpus_that_it_is_given():
    assert configured("process", cuda_visible_devices="0,1").env["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert configured("process", env={"NCCL_DEBUG": "INFO"}).env["NCCL_DEBUG"] == "INFO"
    with pytest.raises(jsonschema.ValidationError):
        configured("process", cuda_visible_devices="0; rm")
    plain = configured("process")
    assert "{{" not in json.dumps(plain.env)
    assert plain.env["PESC_STORE"] == "/srv/store"
    assert plain.env["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "180"


def host_config(**values):
    """What docker-py would send for the container of a run."""
    module = pytest.importorskip("prefect_docker.worker")
    configuration = configured("docker", **values)
    docker_client = SimpleNamespace(version=lambda: {"Version": "27.0.0"}, api=SimpleNamespace(base_url="http+docker://localhost"))
    settings = module.DockerWorker._build_container_settings(SimpleNamespace(_logger=None), docker_client, configuration)
    sent = _create_container_args({**settings, "version": "1.45"})
    return sent, sent["host_config"]


def test_docker_gives_a_container_gpus_shared_memory_and_the_store():
    sent, host = host_config()
    assert host["DeviceRequests"] == [{"Driver": "nvidia", "Count": 1, "DeviceIDs": [], "Capabilities": [["gpu"]], "Options": {}}]
    assert host["ShmSize"] == 16 << 30
    assert "IpcMode" not in host
    assert host["Binds"] == ["/srv/store:/store"]
    assert host["Ulimits"] == [{"Name": "memlock", "Soft": -1, "Hard": -1}]
    assert host["AutoRemove"] is True
    assert not host.get("Privileged")
    assert sent["image"] == "pesc:0.1.0-gpu"
    assert sent["environment"]["PESC_STORE"] == "/store"


def test_a_container_reaches_a_server_of_its_own_node():
    sent, host = host_config()
    assert host["NetworkMode"] == "host"
    assert sent["environment"]["PREFECT_API_URL"] == "http://127.0.0.1:9/api"
    sent, host = host_config(network_mode="bridge")
    assert host["NetworkMode"] == "bridge"
    assert sent["environment"]["PREFECT_API_URL"] == "http://host.docker.internal:9/api"


def test_docker_takes_chosen_gpus_the_nodes_ipc_and_another_user():
    chosen = [{"driver": "nvidia", "device_ids": ["0", "3"], "capabilities": [["gpu"]]}]
    sent, host = host_config(
        device_requests=chosen, ipc_mode="host", user="1234:1234", mem_limit="64g", image="registry.example.com/pesc:2"
    )
    assert host["DeviceRequests"][0]["DeviceIDs"] == ["0", "3"]
    assert host["IpcMode"] == "host"
    assert host["Memory"] == 64 << 30
    assert sent["user"] == "1234:1234"
    assert sent["image"] == "registry.example.com/pesc:2"
    with pytest.raises(jsonschema.ValidationError):
        configured("docker", device_requests=[{"count": 1, "device_ids": ["0"], "capabilities": [["gpu"]]}])


def test_a_container_of_the_cpu_pool_asks_for_no_gpu():
    assert configured("docker", pool="cpu").container_create_kwargs["device_requests"] == []
    assert configured("docker", pool="cpu").image == "pesc:0.1.0-cpu"


def job(pool="gpu", **values):
    """The Job that the worker would create, and its container."""
    validator = pytest.importorskip("kubernetes_validate")
    manifest = configured("kubernetes", pool=pool, **values).job_manifest
    pod = manifest["spec"]["template"]["spec"]
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)  # Prefect wants them here, Kubernetes knows them one level up
    validator.validate(manifest, "1.37", strict=True)
    return manifest, pod, pod["containers"][0]


def test_kubernetes_takes_the_job():
    manifest, pod, container = job()
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1, "memory": "32Gi"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert pod["nodeSelector"] == {}
    assert pod["volumes"] == [
        {"name": "store", "persistentVolumeClaim": {"claimName": "pesc-store"}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}},
    ]
    assert container["volumeMounts"] == [{"name": "store", "mountPath": "/store"}, {"name": "shared-memory", "mountPath": "/dev/shm"}]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["terminationGracePeriodSeconds"] == 120
    assert container["args"] == ["prefect", "flow-run", "execute"]
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert environment["PESC_STORE"] == "/store"
    assert environment["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"  # an evicted run is scheduled again
    assert manifest["spec"]["backoffLimit"] == 0
    assert manifest["metadata"]["generateName"].startswith("train-pesc")


def test_kubernetes_takes_eight_gpus_of_chosen_nodes_and_secrets():
    _, pod, container = job(
        gpus=8,
        node_selector={"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
        tolerations=[{"key": "reserved", "operator": "Equal", "value": "pesc", "effect": "NoSchedule"}],
        env_from=[{"secretRef": {"name": "hub-token"}}],
        image_pull_secrets=[{"name": "registry"}],
        service_account_name="pesc",
        memory="256Gi",
        cpu="64",
        shm_size="64Gi",
        store_claim="models",
        env={"NCCL_DEBUG": "INFO"},
    )
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8, "memory": "256Gi"}, "requests": {"cpu": "64", "memory": "256Gi"}}
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert pod["serviceAccountName"] == "pesc"
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "models"
    assert container["envFrom"] == [{"secretRef": {"name": "hub-token"}}]
    assert {"name": "NCCL_DEBUG", "value": "INFO"} in container["env"]


def test_a_pod_of_the_cpu_pool_asks_for_no_gpu():
    _, pod, container = job(pool="cpu")
    assert container["resources"]["limits"] == {"memory": "32Gi"}
    assert pod["tolerations"] == []


def test_the_schema_of_kubernetes_refuses_a_field_that_does_not_exist():
    validator = pytest.importorskip("kubernetes_validate")
    manifest, pod, _ = job()
    pod["nodeSelectors"] = {}
    with pytest.raises(validator.ValidationError):
        validator.validate(manifest, "1.37", strict=True)


def test_a_slurm_run_is_a_step_that_asks_for_what_it_needs():
    configuration = configured("slurm", gpus="h100:8", partition="gpu", time_limit="2-00:00:00", python="/opt/pesc/.venv/bin/python")
    python = "/opt/pesc/.venv/bin/python"
    assert configuration.command == f"{python} -m deployments.slurm_step -- {python} -m prefect flow-run execute"
    asked = {name: value for name, value in configuration.env.items() if name.startswith(("SLURM_", "SRUN_"))}
    assert asked == {
        "SLURM_GPUS_PER_NODE": "h100:8", "SLURM_PARTITION": "gpu", "SLURM_TIMELIMIT": "2-00:00:00", "SLURM_MEM_PER_NODE": "32G",
        "SRUN_CPUS_PER_TASK": "8",
    }  # fmt: skip
    assert str(configuration.working_dir) == "/srv/pesc"
    assert "SLURM_GPUS_PER_NODE" not in configured("slurm", pool="cpu").env
    for wrong in ({"gpus": "0"}, {"python": 3}, {"memory": "lots"}, {"time_limit": "a day"}):
        with pytest.raises(jsonschema.ValidationError):
            configured("slurm", **wrong)


def test_a_container_of_any_user_has_places_that_it_may_write_to():
    """The image's home belongs to its own user; and a user without an entry in the image has no name unless the environment gives one."""
    configuration = configured("docker", user="4321:4321")
    assert configuration.container_create_kwargs["user"] == "4321:4321"
    assert configuration.env["HOME"] == "/tmp"
    assert configuration.env["PREFECT_HOME"].startswith("/tmp/")
    assert configuration.env["USER"]
    assert configured("docker", env={"HOME": "/data/home"}).env["HOME"] == "/data/home"


def test_the_settings_that_keep_the_password_out_of_a_job_are_those_of_prefect_kubernetes(monkeypatch):
    settings = pytest.importorskip("prefect_kubernetes.settings")
    named = re.findall(r"`(PREFECT_INTEGRATIONS_KUBERNETES_\w+)=([\w-]+)`", (Path(__file__).resolve().parents[2] / "README.md").read_text())
    assert len(named) == 2
    for name, value in named:
        monkeypatch.setenv(name, value)
    worker = settings.KubernetesSettings().worker
    assert (worker.api_auth_string_secret_name, worker.api_auth_string_secret_key) == ("pesc-prefect", "auth")
