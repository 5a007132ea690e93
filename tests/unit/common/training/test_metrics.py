"""What a run reports: lines that survive kills and resuming, curves as a picture, TensorBoard's event files."""

from __future__ import annotations

import builtins
import json
import os
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from processes import output

from clipmb.common.training import plots, tensorboard
from clipmb.common.training.metrics import METRICS_NAME, Metrics, read_metrics
from clipmb.common.training.plots import CURVES_NAME, draw


def evaluation(value):
    way = {"recall@1": value, "recall@5": 0.5, "recall@10": 0.75, "median_rank": 7.0}
    return {
        "zero_shot": {"top1": value, "top5": 0.5, "classes": 10, "images": 100},
        "retrieval": {"image_to_text": way, "text_to_image": dict(way), "images": 100, "captions": 500},
        "skipped": [{"id": "a.png", "reason": "broken"}],
    }


def run(folder, first, last, every=5):
    """Writes the lines of steps first to last."""
    with Metrics(folder, first - 1) as metrics:
        for step in range(first, last + 1):
            metrics.write({"step": step, "epoch": 0, "loss": 5 / step, "grad_norm": 1.0, "pairs_per_second": 100.0})
            if step % every == 0:
                metrics.write({"step": step, "evaluation": evaluation(step / 100)})


def steps(folder):
    return [line["step"] for line in read_metrics(folder)]


def test_every_line_is_on_disk_when_write_returns(tmp_path):
    metrics = Metrics(tmp_path / "new" / "run", 0)
    for step in (1, 2):
        metrics.write({"step": step, "loss": 0.1 * step})
        assert [json.loads(line) for line in (tmp_path / "new/run" / METRICS_NAME).read_text("utf-8").splitlines()] == [
            {"step": i, "loss": 0.1 * i} for i in range(1, step + 1)
        ]
    metrics.close()


def test_values_become_json(tmp_path):
    with Metrics(tmp_path, 0) as metrics:
        metrics.write(
            {
                "step": np.int64(3),
                "loss": np.float32(0.5),
                "rate": np.array(1e-5),
                "bad": float("nan"),
                "worse": np.float64("-inf"),
                "good": np.True_,
                "nested": {"list": [np.float64(0.25), "é", None, True], 1: (2,)},
            }
        )
    (line,) = read_metrics(tmp_path)
    assert line == {
        "step": 3, "loss": 0.5, "rate": 1e-5, "bad": None, "worse": None, "good": True,
        "nested": {"list": [0.25, "é", None, True], "1": [2]},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        ({"loss": 1.0}, ValueError, "step must be"),
        ({"step": 1.0}, ValueError, "step must be"),
        ({"step": True}, ValueError, "step must be"),
        ({"step": -1}, ValueError, "step must be"),
        ({"step": 1, "loss": np.zeros(2)}, TypeError, "loss must be"),
        ({"step": 1, "a": {"b": [1, object()]}}, TypeError, r"a\.b\[1\] must be"),
    ],
)
def test_bad_values_write_nothing(tmp_path, values, kind, words):
    with Metrics(tmp_path, 0) as metrics, pytest.raises(kind, match=words):
        metrics.write(values)
    assert (tmp_path / METRICS_NAME).read_bytes() == b""


def test_resuming_drops_the_lines_of_later_steps(tmp_path):
    run(tmp_path, 1, 12)
    before = (tmp_path / METRICS_NAME).read_bytes()
    run(tmp_path, 11, 20)
    assert steps(tmp_path) == [*range(1, 6), 5, *range(6, 11), 10, *range(11, 16), 15, *range(16, 21), 20]
    kept = b"".join(line for line in before.splitlines(keepends=True) if json.loads(line)["step"] <= 10)
    assert (tmp_path / METRICS_NAME).read_bytes().startswith(kept)
    run(tmp_path, 1, 2)
    assert steps(tmp_path) == [1, 2]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_torn_last_line_is_dropped(tmp_path, cut):
    run(tmp_path, 1, 4)
    expected = [1, 2, 3, 4] if cut == 1 else [1, 2, 3]  # of one line only its end is missing
    path = tmp_path / METRICS_NAME
    path.write_bytes(path.read_bytes()[:-cut])
    assert steps(tmp_path) == expected
    run(tmp_path, 5, 6)
    assert steps(tmp_path) == [*expected, 5, 5, 6]
    assert path.read_bytes().endswith(b"}\n")


def test_zeros_at_the_end_are_a_torn_line(tmp_path):
    """As a file system may leave them when the machine stops."""
    run(tmp_path, 1, 3)
    with open(tmp_path / METRICS_NAME, "ab") as file:
        file.write(bytes(100))
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("line", [b"{]", b"[1]", b'{"loss": 1}', b'{"step": "1"}', b"\xff", b""])
def test_a_damaged_line_before_the_last_is_named(tmp_path, line):
    run(tmp_path, 1, 3)
    lines = (tmp_path / METRICS_NAME).read_bytes().splitlines()
    (tmp_path / METRICS_NAME).write_bytes(b"\n".join([lines[0], line, *lines[1:], b""]))
    for what in (lambda: Metrics(tmp_path, 2), lambda: read_metrics(tmp_path), lambda: draw(tmp_path)):
        with pytest.raises(ValueError, match="line 2"):
            what()
    assert len((tmp_path / METRICS_NAME).read_bytes().splitlines()) == 4  # still there


def test_a_kill_while_resuming_leaves_the_old_lines_or_the_new(tmp_path, monkeypatch):
    run(tmp_path, 1, 8, every=99)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Metrics(tmp_path, 4)
    assert steps(tmp_path) == [*range(1, 9)]


def test_a_killed_process_loses_nothing_that_was_written(tmp_path):
    script = """
import sys
from clipmb.common.training.metrics import Metrics
metrics = Metrics(sys.argv[1], 0)
for step in range(1, 10**9):
    metrics.write({"step": step, "loss": 1 / step, "text": "x" * 20_000})
    print(step, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True)
    seen = [process.stdout.readline() for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    seen += process.stdout.readlines()
    process.stdout.close()
    process.wait()
    told = int(seen[-1])
    found = steps(tmp_path)
    assert found == [*range(1, len(found) + 1)]
    assert told <= len(found) <= told + 1


def panels(folder):
    lines = read_metrics(folder)
    return [*plots._step_panels(lines), *plots._evaluation_panels(lines)]


def test_there_is_a_panel_for_every_metric(tmp_path):
    with Metrics(tmp_path, 0) as metrics:
        for step in range(1, 7):
            metrics.write(
                {
                    "step": step, "epoch": 0, "memory": 3, "logit_scale": 14.0 + step, "note": "text", "loss": 1 / step,
                    "learning_rate": 1e-5 * step, "grad_norm": float("inf") if step == 3 else 2.0,
                    "pairs_per_second": 100.0, "logit_bias": -10.0,
                }
            )  # fmt: skip
            if step % 3 == 0:
                metrics.write({"step": step, "evaluation": evaluation(step / 10)})
    found = {panel.title: panel.curves for panel in panels(tmp_path)}
    assert list(found) == [
        "Loss", "Learning rate", "Gradient norm, before clipping", "Logit scale", "Logit bias", "Pairs per second",
        "Memory", "Zero-shot classification", "Retrieval: image to text", "Retrieval: text to image",
        "Retrieval: median rank",
    ]  # fmt: skip
    steps, values = found["Loss"]["loss"]
    assert steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert values.tolist() == [1 / step for step in range(1, 7)]
    assert np.isnan(found["Gradient norm, before clipping"]["grad_norm"][1]).tolist() == [0, 0, 1, 0, 0, 0]
    assert list(found["Zero-shot classification"]) == ["top1", "top5"]
    assert list(found["Retrieval: image to text"]) == ["recall@1", "recall@5", "recall@10"]
    assert list(found["Retrieval: median rank"]) == ["image to text", "text to image"]
    steps, values = found["Zero-shot classification"]["top1"]
    assert (steps.tolist(), values.tolist()) == ([3, 6], [0.3, 0.6])


def near(pixels, colour):
    """Where a picture has a colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return (np.abs(pixels.astype(int) - wanted) <= 12).all(axis=2)


def test_the_picture_shows_the_curves(tmp_path):
    """One curve, read back: the darkest column of each place lies where the falling loss does."""
    with Metrics(tmp_path, 0) as metrics:
        for step in range(1, 401):
            metrics.write({"step": step, "loss": 5 - step / 100, "grad_norm": float("nan") if step == 200 else None})
    assert draw(tmp_path) == tmp_path / CURVES_NAME
    with Image.open(tmp_path / CURVES_NAME) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[0] > 300
    assert pixels.shape[1] == 2 * round(4.4 * 120)
    left = pixels[:, : pixels.shape[1] // 2]
    rows, columns = np.nonzero(near(left, plots._COLOURS[0]))
    assert np.ptp(columns) > 0.7 * left.shape[1]
    assert np.ptp(rows) > 0.5 * left.shape[0]
    assert np.corrcoef(columns, rows)[0, 1] > 0.99  # rows count downwards
    assert not near(left, plots._RED).any()
    assert near(pixels[:, left.shape[1] :], plots._RED).any()  # not one value of the norm was finite


@pytest.mark.parametrize("count", [1, 3000])
def test_runs_of_any_length_are_drawn(tmp_path, count):
    run(tmp_path, 1, count, every=max(1, count // 5))
    with Image.open(draw(tmp_path)) as image:
        pixels = np.asarray(image.convert("RGB"))
        assert image.size == (3 * round(4.4 * 120), round((3 * 2.9 + 0.5) * 120))
    for colour in plots._COLOURS[:3] if count > 1 else plots._COLOURS[:2]:
        assert near(pixels, colour).sum() > 20


def test_means_and_bands_of_long_curves(tmp_path):
    """A spike in one of 4000 steps is in the band."""
    values = np.ones(4000)
    values[1234] = 50.0
    drawn = {}

    class Axes:
        def fill_between(self, x, low, high, **_):
            drawn.update(low=low, high=high)

        def plot(self, x, y, *_, **__):
            drawn.update(x=x, y=y)

    plots._Panel("", {})._curve(Axes(), "loss", np.arange(1, 4001), values, "black")
    assert len(drawn["x"]) == len(drawn["y"]) == 200
    assert max(drawn["high"]) == 50
    assert min(drawn["low"]) == 1
    assert np.mean(drawn["y"]) == pytest.approx(values.mean())


def test_no_global_state_of_matplotlib_is_changed(tmp_path):
    script = """
import sys, matplotlib
before = matplotlib.rcParams.copy()  # which, unlike dict(), resolves nothing
from clipmb.common.training.plots import draw
draw(sys.argv[1])
assert matplotlib.rcParams.copy() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    run(tmp_path, 1, 3)
    output("-W", "error", "-c", script, tmp_path)


def test_nothing_to_draw(tmp_path):
    with pytest.raises(FileNotFoundError, match=METRICS_NAME):
        draw(tmp_path)
    Metrics(tmp_path, 0).close()
    with pytest.raises(ValueError, match="no steps to plot"):
        draw(tmp_path)
    assert not (tmp_path / CURVES_NAME).exists()


def test_a_missing_matplotlib_is_named_with_the_pip_command(tmp_path, monkeypatch):
    run(tmp_path, 1, 2)
    real = builtins.__import__

    def blocked(name, *rest, **options):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(ImportError, match=r'matplotlib.*pip install "clipmb\[train\]"'):
        draw(tmp_path)


def events(folder):
    """Reads event files with nothing but the format: length, its checksum, the message, its checksum."""
    from tensorboard.compat.proto.event_pb2 import Event

    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def test_event_files_have_every_number(tmp_path):
    with Metrics(tmp_path, 0) as metrics:
        metrics.write({"step": 1, "epoch": 0, "loss": 0.5, "bad": float("nan"), "note": "text"})
        metrics.write({"step": 1, "evaluation": {"zero_shot": {"top1": 0.25}, "skipped": []}})
        values = [
            (event.step, value.tag, value.simple_value) for event in events(tmp_path) for value in event.summary.value
        ]  # read before the file is closed
    assert values == [(1, "epoch", 0.0), (1, "loss", 0.5), (1, "evaluation/zero_shot/top1", 0.25)]
    assert events(tmp_path)[0].file_version == "brain.Event:2"


def test_tensorboard_reads_a_resumed_run_and_no_framework_is_imported(tmp_path):
    """In a process where the reader cannot find TensorFlow; what is written must not import it where it is found."""
    script = """
import sys
from clipmb.common.training.metrics import Metrics
def run(first, last):
    with Metrics(sys.argv[1], first - 1) as metrics:
        for step in range(first, last + 1):
            metrics.write({"step": step, "loss": 1.0 / step})
run(1, 8); run(5, 6)
print(*sorted({name.split(".")[0] for name in sys.modules} & {"tensorflow", "torch", "jax", "keras"}), "clean")
sys.modules["tensorflow"] = None
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator(sys.argv[1] + "/tensorboard").Reload()
print(*(event.step for event in found.Scalars("loss")))
"""
    assert output("-c", script, tmp_path).splitlines() == ["clean", "1 2 3 4 5 6"]


def test_without_tensorboard_there_are_no_event_files_and_no_word(tmp_path, monkeypatch, caplog):
    real = tensorboard.importlib.util.find_spec
    monkeypatch.setattr(
        tensorboard.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "tensorboard" else real(name, *rest),
    )
    run(tmp_path, 1, 3)
    assert steps(tmp_path) == [1, 2, 3]
    assert not (tmp_path / "tensorboard").exists()
    assert caplog.text == ""


def test_a_tensorboard_that_does_not_work_is_told_and_stops_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    run(tmp_path, 1, 3)
    assert steps(tmp_path) == [1, 2, 3]
    assert "No TensorBoard files" in caplog.text
