"""The progress bar: on terminals only, with the rate and the time that is left."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

WORK = """
import time
from clipmb.common.progress import progress_bar
with progress_bar(True, "items", 8, done=2) as advance:
    for _ in range(6):
        time.sleep(0.2)
        advance(1, "items, 1 error")
"""


def shown(stderr):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "100", "TERM": "xterm"}
    return subprocess.Popen([sys.executable, "-c", WORK], stderr=stderr, env=environment)


@pytest.mark.skipif(os.name == "nt", reason="there are no such terminals")
def test_a_terminal_is_shown_the_rate_and_the_time_left():
    reader, writer = os.openpty()
    process = shown(writer)
    os.close(writer)
    said = b""
    while True:
        try:
            part = os.read(reader, 4096)
        except OSError:  # the terminal is closed
            break
        if not part:
            break
        said += part
    os.close(reader)
    assert process.wait() == 0
    assert re.search(rb"items, 1 error .* [3-7]/8 .*\d\.\d/s .*0:00:0\d", re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", said))


def test_nothing_is_written_elsewhere():
    process = shown(subprocess.PIPE)
    assert process.communicate()[1] == b""
