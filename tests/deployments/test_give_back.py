"""Runs that a worker had taken and that had not begun when it was stopped."""

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.states import Completed, Pending, Running

from deployments.worker import give_back

pytestmark = pytest.mark.usefixtures("prefect_server")


@flow
def work():
    pass


def test_they_go_back_to_their_queue_and_the_others_are_left_alone():
    with get_client(sync_client=True) as client:
        runs = [client.create_flow_run(work, state=state) for state in (Pending(), Running(), Completed())]
        assert give_back(run.id for run in runs) == [runs[0].name]
        assert [client.read_flow_run(run.id).state.type.value for run in runs] == ["SCHEDULED", "RUNNING", "COMPLETED"]
