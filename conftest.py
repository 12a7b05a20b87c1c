"""Names the pytest plugin, for a checkout that is not installed."""

pytest_plugins = ["harness.pytest_plugin"]
