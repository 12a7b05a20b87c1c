"""Known differences: the test fails as it must, or it is told to be out of date."""

from __future__ import annotations

import re
from collections.abc import Generator

import pytest
import torch

from harness.matrix import Difference


def known(item: pytest.Item) -> Difference | None:
    """The difference that the test's model is known to show in the test's suite and case."""
    mark, parameters = item.get_closest_marker("suite"), getattr(getattr(item, "callspec", None), "params", {})
    if mark is None or "case" not in parameters:
        return None
    differences: tuple[Difference, ...] = parameters["subject"][0].differences
    here = ("", "cuda" if torch.cuda.is_available() else "cpu")
    here_known = (d for d in differences if d.device in here)
    return next((d for d in here_known if mark.args[0] in d.suites and parameters["case"] in d.cases), None)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Turns the failure that a known difference explains into an expected one, and its absence into a failure."""
    difference = known(pyfuncitem)
    if difference is None:
        return (yield)
    try:
        yield
    except (AssertionError, pytest.fail.Exception) as error:
        if re.search(difference.finding, str(error)) is None:
            raise
        pytest.xfail(f"{difference.reason} Found: {re.search(difference.finding, str(error))[0]}")  # type: ignore[index]
    pytest.fail(
        f"the known difference is gone ({difference.reason}): remove it from the model's YAML file", pytrace=False
    )
