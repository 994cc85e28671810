"""Dockerfile, .dockerignore and compose.yaml, by what can be had without a Docker engine: hadolint, docker-py, Compose's own parser.

No image has been built in these tests, and no container started.
"""

from __future__ import annotations

import http.server
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from docker.utils.build import exclude_paths

from deployments.docker.healthy import main
from deployments.fleet import IMAGE_HOME, IMAGE_STORE, load_fleet
from pesc import __version__

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deployments" / "docker"
DOCKERFILE, COMPOSE = FOLDER / "Dockerfile", FOLDER / "compose.yaml"
PASSWORDS = {"PREFECT_API_AUTH_STRING": "admin:secret", "PESC_DATABASE_PASSWORD": "hidden"}


def program(name: str) -> str:
    """The program beside this Python, or on the PATH; skips where there is none."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"no {name} here: pip install the dev extra")
    return found


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in order: name and arguments."""
    text = re.sub(r"(?m)^#.*\n", "", DOCKERFILE.read_text()).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Each stage's base and instructions."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for name, rest in instructions():
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            found[stage] = (base, [])
        elif found:
            found[list(found)[-1]][1].append((name, rest))
    return found


def line_of(stage: str) -> list[tuple[str, str]]:
    """All instructions that make a stage, its bases' first."""
    base, own = stages()[stage]
    return [*(line_of(base) if base in stages() else []), *own]


def test_hadolint_has_nothing_to_say(tmp_path):
    hadolint = program("hadolint")
    done = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    wrong = tmp_path / "Dockerfile"
    wrong.write_text(DOCKERFILE.read_text() + "\nRUN cd /tmp && sudo true\n")
    assert subprocess.run([hadolint, str(wrong)], capture_output=True, timeout=60, check=False).returncode == 1


def test_the_base_is_pinned_by_digest_and_torch_by_version():
    (base,) = [rest for name, rest in instructions() if name == "ARG" and rest.startswith("PYTHON_IMAGE=")]
    assert re.fullmatch(r"PYTHON_IMAGE=python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", base)
    assert {base for base, _ in stages().values()} <= {*stages(), "scratch", "${PYTHON_IMAGE}"}
    assert "latest" not in DOCKERFILE.read_text()
    assert re.search(r"(?m)^torch==[\d.]+$", (ROOT / "constraints.txt").read_text())
    installs = [rest for name, rest in instructions() if name == "RUN" and "pip install" in rest]
    assert len(installs) == 2
    assert all("$(grep '^torch==' constraints.txt)" in text and "--constraint constraints.txt" in text for text in installs)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_target_ends_as_a_user_without_rights_with_the_code_where_the_fleet_expects_it(target):
    made = line_of(target)
    assert made[-1] == ("USER", "1000:1000")
    assert ("WORKDIR", IMAGE_HOME) in made
    assert ("COPY", f"--from=code / {IMAGE_HOME}/") in made
    assert ("VOLUME", IMAGE_STORE) in made
    environment = " ".join(rest for name, rest in made if name == "ENV")
    assert f"PESC_HOME={IMAGE_HOME}" in environment
    assert f"PESC_STORE={IMAGE_STORE}" in environment
    assert ("NVIDIA_VISIBLE_DEVICES=all" in environment) is (target == "gpu")
    assert [json.loads(rest) for name, rest in made if name == "ENTRYPOINT"] == [["/usr/bin/tini", "--"]]
    run = next(rest for name, rest in made if name == "RUN" and "useradd" in rest)
    assert "--uid 1000" in run
    assert "tini" in run


def test_no_secret_is_asked_for_or_kept():
    assert {name for name, _ in instructions()} <= {
        "ARG",
        "FROM",
        "COPY",
        "SHELL",
        "RUN",
        "ENV",
        "LABEL",
        "WORKDIR",
        "VOLUME",
        "ENTRYPOINT",
        "CMD",
        "USER",
    }
    assert not re.search(r"(?i)token|password|secret|auth_string|api_key", re.sub(r"(?m)^#.*$", "", DOCKERFILE.read_text()))


def test_everything_that_is_copied_exists_and_is_let_through_and_nothing_else_is(tmp_path):
    copied = [shlex.split(rest)[:-1] for name, rest in instructions() if name == "COPY" and not rest.startswith("--from")]
    sources = sorted({source for words in copied for source in words})
    for source in sources:
        path = tmp_path / source
        if (ROOT / source).is_dir():
            path.mkdir()
            (path / "module.py").touch()
            for left_out in (".env", "worker.env", "key.pem", "__pycache__"):
                (path / left_out).touch()
        else:
            assert (ROOT / source).is_file()
            path.touch()
    for left_out in (".git", "store", "tests", ".venv"):
        (tmp_path / left_out).mkdir()
        (tmp_path / left_out / "file").touch()
    (tmp_path / ".env").touch()
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    sent = {path for path in exclude_paths(str(tmp_path), patterns) if (tmp_path / path).is_file()}
    assert sent == {f"{source}/module.py" if (tmp_path / source).is_dir() else source for source in sources}


def compose(*arguments: str, text: str | None = None, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`docker compose config`: the file, read, checked against the specification and filled in."""
    command = [program("docker-compose"), "--file", "-" if text else str(COMPOSE), "--project-directory", str(FOLDER), *arguments]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PESC_", "PREFECT_"))}
    return subprocess.run(
        command,
        input=text,
        env={**kept, **(PASSWORDS if environment is None else environment)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="module")
def services():
    """The services as Compose understands them, all profiles on."""
    done = compose("--profile", "gpu", "--profile", "tools", "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["services"]


def test_compose_accepts_the_file_and_no_other():
    wrong = COMPOSE.read_text().replace("stop_grace_period", "stop_grace", 1)
    done = compose("config", text=wrong)
    assert done.returncode != 0
    assert "stop_grace" in done.stderr


@pytest.mark.parametrize("name", PASSWORDS)
def test_without_a_password_it_does_not_start_and_says_what_is_missing(name):
    done = compose("config", environment={key: value for key, value in PASSWORDS.items() if key != name})
    assert done.returncode != 0
    assert f"required variable {name} is missing a value" in done.stderr
    assert not re.search(r"(secret|hidden)", COMPOSE.read_text())


def test_without_the_profile_no_gpu_is_needed():
    done = compose("config", "--services")
    assert set(done.stdout.split()) == {"database", "server", "bootstrap", "orchestrate-worker", "cpu-worker"}


def test_the_gpu_worker_has_all_gpus_and_room_for_its_ranks(services):
    worker = services["gpu-worker"]
    assert worker["deploy"]["resources"]["reservations"]["devices"] == [{"driver": "nvidia", "count": -1, "capabilities": ["gpu"]}]
    assert int(worker["shm_size"]) == 16 << 30
    assert worker["image"] == f"pesc:{__version__}-gpu"
    assert worker["build"]["target"] == "gpu"
    assert worker["command"][-4:] == ["--pool", "gpu", "--limit", "1"]
    assert services["cpu-worker"]["image"] == f"pesc:{__version__}-cpu"
    assert Path(worker["build"]["context"]) == ROOT
    assert (ROOT / worker["build"]["dockerfile"]) == DOCKERFILE


def test_a_worker_that_is_stopped_lets_its_runs_save(services):
    for name in ("gpu-worker", "cpu-worker", "orchestrate-worker"):
        worker = services[name]
        assert worker["command"][:3] == ["python", "-m", "deployments.worker"]
        assert seconds(worker["stop_grace_period"]) >= float(worker["environment"]["PESC_WORKER_GRACE"]) + 10


def seconds(text: str) -> float:
    minutes, rest = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", text).groups()
    return 60 * float(minutes or 0) + float(rest or 0)


def test_everything_waits_until_what_it_needs_is_healthy(services):
    needs = {
        name: {other: how["condition"] for other, how in (service.get("depends_on") or {}).items()} for name, service in services.items()
    }
    assert needs["server"] == {"database": "service_healthy"}
    assert needs["bootstrap"] == {"server": "service_healthy"}
    assert all(needs[f"{name}-worker"] == {"bootstrap": "service_completed_successfully"} for name in ("cpu", "gpu", "orchestrate"))
    assert all("healthcheck" in services[name] for name in ("database", "server", "cpu-worker", "gpu-worker", "orchestrate-worker"))


def test_a_health_check_says_whether_it_answers(services):
    """A string with spaces would not do: podman's Docker API takes it apart."""
    checks = [service["healthcheck"]["test"] for name, service in services.items() if "healthcheck" in service and name != "database"]
    assert {tuple(check[:3]) for check in checks} == {("CMD", "python", "deployments/docker/healthy.py")}
    assert {check[3] for check in checks} == {"4200/api/health", "8080/health"}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        assert main(f"{web.server_port}/") == 0
        assert main(f"{web.server_port}/nowhere") == 1
        web.shutdown()
    assert main("9/health") == 1


def test_only_the_server_can_be_reached_and_only_from_this_machine(services):
    ports = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert [(name, port["host_ip"], port["target"]) for name, given in ports.items() for port in given] == [("server", "127.0.0.1", 4200)]
    assert all(service["cap_drop"] == ["ALL"] for name, service in services.items() if name != "database")
    assert re.fullmatch(r"postgres:[\d.]+-bookworm@sha256:[0-9a-f]{64}", services["database"]["image"])


def test_the_pools_and_queues_of_the_workers_exist(services):
    pools = load_fleet().pools
    served: dict[str, set[str]] = {"cpu": set(), "gpu": set()}
    for name in ("orchestrate-worker", "cpu-worker", "gpu-worker"):
        command = services[name]["command"]
        pool = command[command.index("--pool") + 1]
        queues = {after for word, after in itertools.pairwise(command) if word == "--work-queue"}
        served[pool] |= queues or set(pools[pool].queues)
    assert served == {name: set(pool.queues) for name, pool in pools.items()}


def test_every_setting_of_prefect_is_one_that_it_knows(services):
    from prefect.settings import get_current_settings
    from prefect.settings.legacy import _get_settings_fields

    known = set(_get_settings_fields(type(get_current_settings())))
    told = {name for service in services.values() for name in service.get("environment", {}) if name.startswith("PREFECT_")}
    assert told
    assert told <= known, told - known


def test_yaml_names_the_version_of_the_package():
    assert yaml.safe_load(COMPOSE.read_text())["services"]["gpu-worker"]["image"] == f"${{PESC_IMAGE:-pesc:{__version__}}}-gpu"
    assert DOCKERFILE.read_text().count(f"pesc:{__version__}-") == 3


def test_the_address_of_the_notices_is_with_bootstrap_alone(services):
    assert {name for name, service in services.items() if "PESC_WEBHOOK_URL" in service.get("environment", {})} == {"bootstrap"}


def test_images_have_the_driver_of_the_remote_that_compose_offers(services):
    assert services["cpu-worker"]["build"]["args"]["EXTRAS"] == "s3"
    assert [rest for name, rest in instructions() if name == "ARG" and rest.startswith("EXTRAS")] == ['EXTRAS="s3"'] * 2
