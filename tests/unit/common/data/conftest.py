"""What several files of this folder need."""

from __future__ import annotations

import pytest
from data_cases import folder_of

from clipmb.common.data.pairs import Pairs


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    return Pairs.open(folder_of(tmp_path_factory.mktemp("ten"), 10))
