"""What the plugin changes in the engine core, without an engine."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
from vllm.config import ECTransferConfig
from vllm.v1.executor.abstract import Executor

from harness.capture.connector import transfer_config
from harness.capture.engine_core import PATCHES


@pytest.mark.parametrize(
    ("config", "aggregates"),
    [
        pytest.param(transfer_config(), False, id="ours"),
        pytest.param(ECTransferConfig(ec_connector="ECExampleConnector", ec_role="ec_both"), True, id="another's"),
        pytest.param(None, True, id="none"),
    ],
)
def test_workers_reply_once_for_our_connector_alone(config: ECTransferConfig | None, aggregates: bool) -> None:
    [patch] = [patch for patch in PATCHES if patch.name == "Executor.init_ec_output_aggregator"]
    executor = SimpleNamespace(vllm_config=SimpleNamespace(ec_transfer_config=config), ec_output_aggregator=None)
    patch.wrap(inspect.unwrap(Executor.init_ec_output_aggregator))(executor)
    found = executor.ec_output_aggregator is not None
    assert found == aggregates, f"{'every worker replies' if found else 'no reports are joined'} with {config}"
