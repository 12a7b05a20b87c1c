"""The connector between vLLM's scheduler and its worker, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from vllm.config import VllmConfig
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole
from vllm.v1.core.sched.output import SchedulerOutput

from harness.capture.connector import MMEmbeddingConnector, transfer_config
from harness.capture.scheduler import SchedulerCapture, StepPlan
from harness.capture.settings import CaptureSettings


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> SchedulerCapture:
    capture = SchedulerCapture(CaptureSettings(True, 0, 1 << 20), 8, 0, "bfloat16")
    monkeypatch.setattr(SchedulerCapture, "of", lambda _config: capture)
    return capture


def connector(role: ECConnectorRole, use_v2_model_runner: bool) -> MMEmbeddingConnector:
    config = SimpleNamespace(ec_transfer_config=transfer_config(), use_v2_model_runner=use_v2_model_runner)
    return MMEmbeddingConnector(cast(VllmConfig, config), role)


@pytest.mark.usefixtures("capture")
def test_a_step_with_nothing_to_do_has_no_plan() -> None:
    made = connector(ECConnectorRole.SCHEDULER, use_v2_model_runner=True)
    assert made.build_connector_meta(SchedulerOutput.make_empty()) is None
    made.shutdown()


def test_a_worker_with_the_v1_model_runner_gets_an_empty_one(capture: SchedulerCapture) -> None:
    made = connector(ECConnectorRole.SCHEDULER, use_v2_model_runner=False)
    plan = made.build_connector_meta(SchedulerOutput.make_empty())
    assert plan == StepPlan(capture._arena.address, [], [], False, [])
    made.shutdown()


def test_the_v2_model_runner_leaves_the_connector_out_of_a_step_without_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM does is the reason that a plan may be None."""
    module = pytest.importorskip("vllm.v1.worker.gpu.ec_connector")
    made = connector(ECConnectorRole.WORKER, use_v2_model_runner=True)
    monkeypatch.setattr(module, "get_ec_transfer", lambda: made)

    def called(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the step has no plan")

    for name in ("bind_connector_metadata", "start_load_caches", "build_connector_worker_meta"):
        monkeypatch.setattr(made, name, called)
    runner = module.ActiveECConnector(SimpleNamespace(), {})
    with runner.maybe_get_output(SchedulerOutput.make_empty()) as output:
        assert output is None
