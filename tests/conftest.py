"""Every warning is an error in the harness's own tests; pyproject.toml says why not in the suites."""

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.filterwarnings("error"))
