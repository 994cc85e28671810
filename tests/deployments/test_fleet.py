"""What can be wrong before a server is asked, and the sentence that says it."""

from __future__ import annotations

from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from deployments.bootstrap import main, wanted_things
from deployments.fleet import load_fleet
from deployments.pools import base_job_template


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("PESC_FLEET", "PESC_WEBHOOK_URL", "PESC_REMOTE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PESC_HOME", "/srv/pesc")
    monkeypatch.setenv("PESC_STORE", "/srv/store")
    with temporary_settings(restore_defaults={PREFECT_API_URL, PREFECT_API_AUTH_STRING}):
        yield


def said(capsys, *arguments):
    """What is printed as the failure's sentence."""
    assert main(list(arguments)) == 2
    told = capsys.readouterr()
    assert told.out == ""
    return told.err


def test_without_a_server_it_is_told_how_to_start_one(capsys):
    assert said(capsys) == (
        "bootstrap: PREFECT_API_URL is not set. Start a server (prefect server start) and export "
        "PREFECT_API_URL=http://HOST:4200/api; a temporary server would forget everything.\n"
    )
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):  # as a profile has it
        assert "No Prefect server answers at http://127.0.0.1:9/api" in said(capsys)
        assert "No Prefect server answers at http://127.0.0.1:9/api" in said(capsys, "--check")


@pytest.mark.parametrize("name", ["PESC_HOME", "PESC_STORE"])
def test_a_place_that_is_not_told_or_not_absolute_is_named(capsys, monkeypatch, name):
    monkeypatch.setenv(name, "store")
    assert f"{name} is 'store', but a worker starts elsewhere: give an absolute path." in said(capsys)
    monkeypatch.delenv(name)
    assert f"{name} is not set: it is the path of" in said(capsys)
    assert "of the pool cpu" in said(capsys)


def fleet(tmp_path, text):
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("pols: {}", "is not a fleet: pols: Extra inputs are not permitted. deployments/fleet.yaml shows the settings."),
        ("pools: {gpu: {type: lsf}}", "pools.gpu.type: Input should be 'process', 'docker', 'kubernetes' or 'slurm'"),
        ("pools: {gpu: {queues: {train: {priority: 2}}}}", "Two queues of the pool gpu have the same priority"),
        (
            "pools: {gpu: {variables: {gpu: 3}}}",
            "pools.gpu.variables has gpu, which process pools do not have. They have command, cuda_visible",
        ),
        ("heartbeat_seconds: 5", "heartbeat_seconds: Input should be greater than or equal to 30"),
        ("deployments: {pipeline/monthly: {}}", "The fleet changes pipeline/monthly, which prefect.yaml does not have. It has dedup/cpu,"),
        ("deployments: {pipeline/cpu: {parametrs: {}}}", "The deployment pipeline/cpu says parametrs; it may say "),
        ("deployments: {pipeline/cpu: {parameters: {recip: demo}}}", "The parameters of the deployment pipeline/cpu are not the flow's"),
        ("deployments: {pipeline/cpu: {work_pool: {name: tpu}}}", "goes to the pool tpu, which the fleet does not have: cpu, gpu."),
        ("deployments: {pipeline/cpu: {work_pool: {work_queue_name: fast}}}", "goes to the queue cpu/fast, which the fleet does not have."),
        ("pools: {gpu: {type: kubernetes, gpus: -1}}", "The kubernetes pool gpu wants a number of GPUs"),
        ("pools: 3", "is not a fleet: pools: Input should be a valid dictionary"),
        ("[1, 2]", "is not a map of settings"),
        ("{", "is not YAML"),
    ],
)
def test_a_fault_of_the_fleet_is_named(capsys, tmp_path, text, sentence):
    assert sentence in said(capsys, "--fleet", fleet(tmp_path, text))


def test_a_fleet_file_that_is_not_there_is_named(capsys, monkeypatch):
    monkeypatch.setenv("PESC_FLEET", "/nowhere/fleet.yaml")
    assert said(capsys) == "bootstrap: The fleet /nowhere/fleet.yaml cannot be read: No such file or directory.\n"


def test_the_notices_need_a_web_address(capsys, monkeypatch):
    monkeypatch.setenv("PESC_WEBHOOK_URL", "hooks.example.com")
    assert "PESC_WEBHOOK_URL is no web address" in said(capsys)


def test_there_is_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    for word in ("--check", "--type", "--fleet", "PREFECT_API_URL", "PESC_HOME", "PESC_STORE", "PESC_WEBHOOK_URL"):
        assert word in told


def test_containers_have_the_places_of_the_image_and_the_store_of_the_node():
    pools = load_fleet(pool_type="docker").pools
    variables = base_job_template("gpu", pools["gpu"], 180)["variables"]["properties"]
    assert variables["volumes"]["default"] == ["/srv/store:/store"]
    assert variables["env"]["default"] == {"PESC_HOME": "/opt/pesc", "PESC_STORE": "/store", "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "180"}
    assert variables["device_requests"]["default"] == [{"driver": "nvidia", "count": 1, "capabilities": [["gpu"]]}]
    assert base_job_template("cpu", pools["cpu"], 180)["variables"]["properties"]["device_requests"]["default"] == []


@pytest.mark.parametrize("pool_type", ["process", "docker", "kubernetes", "slurm"])
def test_everything_can_be_worked_out_without_a_server(pool_type):
    things = wanted_things(load_fleet(pool_type=pool_type))
    assert len({str(thing) for thing in things}) == len(things) > 30


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("pools: {gpu: {env: {HF_TOKEN: hf_PlantedPlantedPlanted1234}}}", "pools.gpu.env.HF_TOKEN holds an access token"),
        (
            "pools: {gpu: {env: {WANDB_API_KEY: planted-0123456789}}}",
            "pools.gpu.env.WANDB_API_KEY holds a value that is named like a secret",
        ),
        ("variables: {mirror: 'https://ada:planted@example.com'}", "variables.mirror holds a URL with a password"),
        (
            "deployments: {train/gpu: {parameters: {overrides: ['x=hf_PlantedPlantedPlanted1234']}}}",
            "deployments.train/gpu.parameters.overrides[0] holds an access token",
        ),
        ("pools: {gpu: {env: {PESC_REMOTE: 's3://KEY:planted@bucket'}}}", "pools.gpu.env.PESC_REMOTE holds a URL with a password"),
    ],
)
def test_a_secret_in_a_fleet_is_refused_and_not_repeated(capsys, tmp_path, text, told):
    sentence = said(capsys, "--fleet", fleet(tmp_path, text))
    assert told in sentence
    assert "lanted" not in sentence


def test_a_remote_with_a_password_goes_into_no_deployment(capsys, monkeypatch):
    monkeypatch.setenv("PESC_REMOTE", "s3://KEY:planted-secret@bucket/pesc")
    sentence = said(capsys)
    assert "PESC_REMOTE of the pool cpu: The URL of the remote holds a name or a password." in sentence
    assert "planted" not in sentence
    monkeypatch.setenv("PESC_REMOTE", "some/where")
    assert "must be an absolute path" in said(capsys)


def test_what_differs_is_told_without_a_secret():
    from deployments.server import Difference

    told = str(Difference("job_variables.env.PESC_REMOTE", "s3://KEY:planted-secret@bucket/pesc", "s3://bucket/pesc"))
    assert told == 'job_variables.env.PESC_REMOTE is "s3://***@bucket/pesc", wanted "s3://bucket/pesc"'


H100 = "pools: {h100: {queues: {default: {priority: 1}}}}\ndeployments: {train/h100: {like: train/gpu, work_pool: {name: h100, work_queue_name: default}}}"


def test_a_fleet_adds_a_deployment_that_is_like_another(tmp_path):
    things = {str(thing): thing for thing in wanted_things(load_fleet(Path(fleet(tmp_path, H100))))}
    mine, other = (things[f"deployment train/{name}"].wanted for name in ("h100", "gpu"))
    assert (mine["work_pool_name"], mine["work_queue_name"]) == ("h100", "default")
    changed = {name for name in mine if mine[name] != other[name]}
    assert changed == {"work_pool_name", "work_queue_name"}
    assert "work queue h100/default" in things


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train/h100: {tags: [pesc]}", "A new deployment says which of them it is like: train/h100: {like: train/gpu"),
        (
            "train/h100: {like: mix/cpu}",
            "deployments.train/h100.like is 'mix/cpu', and has to be a deployment of the same flow: train/gpu, train/cpu.",
        ),
        ("tain/h100: {like: train/gpu}", "of the same flow: there is none of 'tain'."),
        ("train/gpu: {like: train/cpu}", "prefect.yaml has train/gpu itself."),
        ("train/h100: {like: train/gpu, work_pool: {name: h100}}", "goes to the pool h100, which the fleet does not have"),
    ],
)
def test_a_new_deployment_that_cannot_be_is_a_sentence(capsys, tmp_path, text, told):
    assert told in said(capsys, "--fleet", fleet(tmp_path, f"deployments: {{{text}}}"))


def test_a_new_weekly_has_no_schedule_of_its_model(tmp_path):
    things = [
        str(thing) for thing in wanted_things(load_fleet(Path(fleet(tmp_path, "deployments: {pipeline/mine: {like: pipeline/weekly}}"))))
    ]
    assert "deployment pipeline/mine" in things
    assert "schedule pipeline/mine:weekly" not in things
