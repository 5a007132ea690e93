"""Jobs of a Ray cluster."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets the programs of others warn, which is their own matter."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))
