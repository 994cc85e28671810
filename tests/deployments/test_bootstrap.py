"""`python -m deployments.bootstrap` against real servers, on SQLite and on PostgreSQL: once, again, and after somebody changed things."""

from __future__ import annotations

import http.server
import json
import sys
import threading
import urllib.request

import pytest
import yaml

from deployments.automations import ZOMBIES
from tests.deployments.servers import ROOT, PrefectServer, postgres, wait_for

__all__ = ["postgres"]
pytestmark = pytest.mark.slow
BOOTSTRAP = [sys.executable, "-m", "deployments.bootstrap"]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request, tmp_path_factory):
    """A server that was bootstrapped once; `server.said` is what that printed."""
    folder = tmp_path_factory.mktemp(request.param)
    database = request.getfixturevalue("postgres").database() if request.param == "postgresql" else None
    with PrefectServer(folder, database=database) as server:
        server.environment["PESC_STORE"] = str(folder / "store")
        server.said = server.run(*BOOTSTRAP)
        yield server


def everything(server: PrefectServer) -> dict:
    """All that bootstrap makes, as the server has it, with the times of its last changes."""
    pools = server.post("work_pools/filter", {})
    return {
        "pools": {pool["name"]: pool for pool in pools},
        "queues": {
            f"{pool['name']}/{queue['name']}": queue
            for pool in pools
            for queue in server.post(f"work_pools/{pool['name']}/queues/filter", {})
        },
        "deployments": {deployment["id"]: deployment for deployment in server.post("deployments/filter", {})},
        "flows": server.post("flows/filter", {"sort": "NAME_ASC"}),
        "automations": server.post("automations/filter", {}),
        "variables": server.post("variables/filter", {}),
        "limits": server.post("v2/concurrency_limits/filter", {}),
        "blocks": server.post("block_documents/filter", {"include_secrets": True}),
    }


def automation_of(server: PrefectServer, name: str) -> dict:
    (found,) = server.post("automations/filter", {"automations": {"name": {"any_": [name]}}})
    return found


def check(server: PrefectServer, *arguments: str) -> tuple[int, list[str]]:
    """Exit code and lines of --check."""
    said = server.run(*BOOTSTRAP, "--check", *arguments, check=False)
    clean = said.startswith("Nothing differs")
    return 0 if clean else 1, [line for line in said.splitlines() if line.startswith(("differs", "missing"))]


def deployment(server: PrefectServer, name: str) -> dict:
    return server.get(f"deployments/name/{name}")


def test_the_second_run_changes_nothing_and_says_so(server):
    assert "things made or changed" in server.said
    before = everything(server)
    assert {
        name: sorted((q["priority"], n) for n, q in before["queues"].items() if n.startswith(f"{name}/")) for name in ("cpu", "gpu")
    } == {
        "cpu": [(1, "cpu/orchestrate"), (2, "cpu/default"), (3, "cpu/maintenance")],
        "gpu": [(1, "gpu/train"), (2, "gpu/default"), (3, "gpu/evaluate")],
    }
    declared = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]
    assert len(before["deployments"]) == len(declared)
    assert "Nothing to change" in server.run(*BOOTSTRAP)
    assert everything(server) == before
    server.run(*BOOTSTRAP, "--check")  # exit code 0


def test_what_somebody_changed_is_named_and_then_put_right(server):
    weekly = deployment(server, "pipeline/weekly")
    server.patch("work_pools/gpu/queues/train", {"concurrency_limit": 3})
    server.patch(f"deployments/{weekly['id']}", {"description": "mine"})
    schedule = {"schedule": {"cron": "5 5 * * *", "timezone": "UTC", "day_or": True}}
    server.patch(f"deployments/{weekly['id']}/schedules/{weekly['schedules'][0]['id']}", schedule)
    code, lines = check(server)
    assert code == 1
    assert lines == [
        "differs  work queue gpu/train: concurrency_limit is 3, wanted 1",
        'differs  deployment pipeline/weekly: description is "mine", wanted '
        '"A recipe every Saturday, dispatched: what has not changed comes from the store…',
        'differs  schedule pipeline/weekly:weekly: schedule.cron is "5 5 * * *", wanted "0 2 * * 6"',
    ]
    said = server.run(*BOOTSTRAP)
    assert said.count("changed  ") == 3
    assert "3 things made or changed" in said
    assert check(server) == (0, [])
    assert deployment(server, "pipeline/weekly")["schedules"][0]["id"] == weekly["schedules"][0]["id"]


def test_what_is_missing_is_named_and_made_again(server):
    name = deployment(server, "evaluate/cpu")["id"]
    server._ask("DELETE", f"deployments/{name}", None)
    server._ask("DELETE", "work_pools/cpu/queues/maintenance", None)
    code, lines = check(server)
    assert code == 1
    assert "missing  work queue cpu/maintenance" in lines
    assert "missing  deployment evaluate/cpu" in lines
    server.run(*BOOTSTRAP)
    assert check(server) == (0, [])
    assert deployment(server, "gc/cpu")["work_queue_name"] == "maintenance"


def test_switches_stay_as_the_user_set_them(server):
    nightly = deployment(server, "pipeline/nightly")
    automation = automation_of(server, ZOMBIES)
    server.patch(f"deployments/{nightly['id']}/schedules/{nightly['schedules'][0]['id']}", {"active": True})
    server.patch(f"automations/{automation['id']}", {"enabled": False})
    server.patch("work_pools/gpu/queues/evaluate", {"is_paused": True})
    server.patch("work_pools/cpu", {"is_paused": True})
    mine = {"active": True, "slug": "mine", "schedule": {"cron": "7 7 * * *"}}
    server.post(f"deployments/{nightly['id']}/schedules", [mine])
    server.patch(f"deployments/{nightly['id']}", {"description": "changed, so that bootstrap writes the deployment"})
    server.run(*BOOTSTRAP)
    schedules = {schedule["slug"]: schedule for schedule in deployment(server, "pipeline/nightly")["schedules"]}
    assert {slug: schedule["active"] for slug, schedule in schedules.items()} == {"nightly": True, "mine": True}
    assert automation_of(server, ZOMBIES)["enabled"] is False
    assert server.get("work_pools/gpu/queues/evaluate")["is_paused"] is True
    assert server.get("work_pools/cpu")["is_paused"] is True
    assert deployment(server, "pipeline/weekly")["schedules"][0]["active"] is False


def test_a_disabled_automation_is_mended_and_stays_disabled(server):
    automation = automation_of(server, ZOMBIES)
    fields = {name: value for name, value in automation.items() if name not in ("id", "created", "updated")}
    changed = {**fields, "enabled": False, "description": "mine", "trigger": {**automation["trigger"], "within": 60}}
    server._ask("PUT", f"automations/{automation['id']}", changed)
    code, lines = check(server)
    assert code == 1
    assert len(lines) == 1
    assert 'description is "mine"' in lines[0]
    assert "trigger.within is 60.0, wanted 540.0" in lines[0]
    server.run(*BOOTSTRAP)
    automation = automation_of(server, ZOMBIES)
    assert automation["enabled"] is False
    assert automation["trigger"]["within"] == 540


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("pipeline/cpu", {"recip": "demo"}, "'recip' was unexpected"),
        ("pipeline/cpu", {"settings": {"train": {"learning_ratee": 1}}}, "'learning_ratee' was unexpected"),
        ("train/gpu", {"settings": {"learning_ratee": 1}}, "'learning_ratee' was unexpected"),
        ("train/cpu", {"execution": {"grace_seconds": "long"}}, "execution"),
        ("gc/cpu", {"keep_day": 3}, "'keep_day' was unexpected"),
        ("fsck/cpu", {"repair": "perhaps"}, "repair"),
    ],
)
def test_the_server_refuses_parameters_that_a_flow_does_not_have(server, name, parameters, said):
    path = f"deployments/{deployment(server, name)['id']}/create_flow_run"
    with pytest.raises(AssertionError, match=r"409|422") as refused:
        server.post(path, {"parameters": parameters})
    assert said in str(refused.value)


def test_the_server_takes_parameters_that_a_flow_has(server):
    path = f"deployments/{deployment(server, 'pipeline/cpu')['id']}/create_flow_run"
    settings = {"train": {"learning_rate": 1e-4}, "dedup": {"near_duplicate_threshold": 0.7}}
    run = server.post(path, {"parameters": {"recipe": "demo", "settings": settings, "refresh": ["evaluate[pesc/mmlu]"]}})
    assert run["parameters"]["settings"] == settings


def test_only_one_run_of_a_schedule_at_a_time(server):
    nightly = deployment(server, "pipeline/nightly")
    assert nightly["global_concurrency_limit"]["limit"] == 1
    assert nightly["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"


class _Receiver(http.server.BaseHTTPRequestHandler):
    """Keeps what is posted."""

    def do_POST(self):
        self.server.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def webhook():
    """A web address and the list of what was posted to it."""
    receiver = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Receiver)
    receiver.received = []
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{receiver.server_port}/hook?token=secret-token", receiver.received
    receiver.shutdown()


def test_a_failure_is_told_to_the_webhook_and_its_address_is_not(server, webhook):
    url, received = webhook
    said = server.run(*BOOTSTRAP, extra={"PESC_WEBHOOK_URL": url})
    assert "made     block pesc-notices" in said
    assert "secret-token" not in said
    before = everything(server)
    assert "Nothing to change" in server.run(*BOOTSTRAP, extra={"PESC_WEBHOOK_URL": url})
    assert everything(server) == before
    assert "secret-token" not in json.dumps(server.post("block_documents/filter", {}))

    elsewhere = server.run(*BOOTSTRAP, extra={"PESC_WEBHOOK_URL": url + "2"})
    assert "changed  block pesc-notices: secrets" in elsewhere
    assert "secret-token" not in elsewhere
    server.run(*BOOTSTRAP, extra={"PESC_WEBHOOK_URL": url})

    time_of_failure = {"type": "FAILED", "message": "mix needs dedup, which the store lacks. Run dedup/cpu first."}
    path = f"deployments/{deployment(server, 'mix/cpu')['id']}/create_flow_run"
    run = server.post(path, {"name": "mix demo", "tags": ["pesc"]})
    server.post(f"flow_runs/{run['id']}/set_state", {"state": time_of_failure, "force": True})
    (notice,) = wait_for(lambda: list(received), 60, "the notice")
    assert notice["text"] == notice["content"]
    assert notice["text"].startswith("Failed: mix demo\nmix/cpu: mix needs dedup, which the store lacks. Run dedup/cpu first.\nhttp")


def test_a_fleet_of_ones_own_needs_no_change_of_the_code(tmp_path):
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(
        json.dumps(
            {
                "heartbeat_seconds": 60,
                "pools": {
                    "cpu": {"type": "process", "env": {"PESC_REMOTE": "s3://bucket/store"}},
                    "gpu": {
                        "type": "kubernetes",
                        "gpus": 8,
                        "variables": {"image": "registry.example.com/pesc:1", "store_claim": "models"},
                        "queues": {"train": {"concurrency_limit": 4}},
                    },
                },
                "limits": {"tag:download": 2},
                "variables": {"pesc_owner": "team"},
                "deployments": {
                    "pipeline/nightly": {
                        "parameters": {"recipe": "/data/mine.yaml"},
                        "schedules": [{"slug": "h", "interval": 3600, "active": True}],
                    }
                },
            }
        )
    )
    with PrefectServer(tmp_path / "server") as server:
        server.environment |= {"PESC_STORE": "/data/store", "PESC_FLEET": str(fleet)}
        server.run(*BOOTSTRAP)
        before = everything(server)
        assert "Nothing to change" in server.run(*BOOTSTRAP)
        assert everything(server) == before
        gpu = before["pools"]["gpu"]
        assert gpu["type"] == "kubernetes"
        variables = gpu["base_job_template"]["variables"]["properties"]
        assert variables["gpus"]["default"] == 8
        assert variables["image"]["default"] == "registry.example.com/pesc:1"
        assert before["queues"]["gpu/train"]["concurrency_limit"] == 4
        assert deployment(server, "train/gpu")["job_variables"] == {"env": {"PESC_STORE": "/store"}}
        assert deployment(server, "train/gpu")["pull_steps"][0]["prefect.deployments.steps.set_working_directory"] == {
            "directory": "/opt/pesc"
        }
        assert deployment(server, "train/cpu")["job_variables"] == {
            "env": {"PESC_STORE": "/data/store", "PESC_REMOTE": "s3://bucket/store"}
        }
        nightly = deployment(server, "pipeline/nightly")
        assert nightly["parameters"]["recipe"] == "/data/mine.yaml"
        assert [(schedule["slug"], schedule["active"], schedule["schedule"]["interval"]) for schedule in nightly["schedules"]] == [
            ("h", True, 3600.0)
        ]
        assert [(limit["name"], limit["limit"]) for limit in before["limits"] if limit["name"].startswith("tag:")] == [("tag:download", 2)]
        assert [(variable["name"], variable["value"]) for variable in before["variables"]] == [("pesc_owner", "team")]
        said = server.run(*BOOTSTRAP, "--type", "docker", check=False, extra={"PESC_FLEET": ""})
        assert "The work pool cpu exists with another type than docker, and Prefect cannot change that." in said
        assert "prefect work-pool delete cpu" in said


def test_a_server_with_a_password_says_what_it_wants(tmp_path):
    with PrefectServer(tmp_path, auth="admin:secret") as server:
        server.environment["PESC_STORE"] = str(tmp_path / "store")
        assert "things made or changed" in server.run(*BOOTSTRAP)
        for wrong in ("", "admin:guess"):
            said = server.run(*BOOTSTRAP, check=False, extra={"PREFECT_API_AUTH_STRING": wrong})
            assert "wants a password. Set PREFECT_API_AUTH_STRING" in said
            assert "Traceback" not in said
        said = server.run(*BOOTSTRAP, check=False, extra={"PREFECT_API_URL": server.url.removesuffix("/api")})
        assert "is no Prefect API" in said or "wants a password" in said
        with urllib.request.urlopen(f"{server.url}/health", timeout=10) as answer:
            assert answer.status == 200
