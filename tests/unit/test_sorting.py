"""Sorting files by label: nothing is replaced, nothing is lost, whatever the names and whenever it ends."""

from __future__ import annotations

import errno
import json
import os

import pytest
from processes import invoke

import clipmb
from clipmb import sorting
from clipmb.sorting import Move, homes, move, plan


def write(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"{folder.name}/{name}")
    return [folder / name for name in names]


def contents(folder):
    return sorted(path.read_text() for path in folder.rglob("*") if path.is_file())


def test_files_go_to_the_folders_of_their_labels(tmp_path):
    images = write(tmp_path / "in", "a.jpg", "b.jpg", "c.jpg")
    before = contents(tmp_path)
    moves = plan(images, ["cat", "dog", "cat"], tmp_path / "out")
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists()
    move(moves)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.jpg")) == [
        "out/cat/a.jpg", "out/cat/c.jpg", "out/dog/b.jpg",
    ]  # fmt: skip
    assert contents(tmp_path) == before
    again = [tmp_path / "out/cat/a.jpg", tmp_path / "out/dog/b.jpg"]
    assert plan(again, ["cat", "cat"], tmp_path / "out") == [Move(again[1], tmp_path / "out/cat/b.jpg")]


def test_equal_names_are_numbered(tmp_path):
    images = [*write(tmp_path / "1", "x.jpg"), *write(tmp_path / "2", "x.jpg"), *write(tmp_path / "3", "X.JPG")]
    write(tmp_path / "out/cat", "x.jpg")
    before = contents(tmp_path)
    moves = plan(images, ["cat"] * 3, tmp_path / "out")
    assert [step.target.name for step in moves] == ["x-2.jpg", "x-3.jpg", "X.JPG"]
    move(moves)
    assert contents(tmp_path) == before
    taken = write(tmp_path / "4", "y.jpg", "Y.jpg")  # one file where upper and lower case are the same
    assert [step.target.name for step in plan(taken, ["dog", "dog"], tmp_path / "out")] == ["y.jpg", "Y-2.jpg"]


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    images = write(tmp_path / "in", "a.jpg", "b.jpg")
    moves = plan(images, ["cat", "cat"], tmp_path / "out")
    write(tmp_path / "out/cat", "b.jpg")
    before = contents(tmp_path)
    with pytest.raises(OSError, match=r"could not be moved.*File exists.*1 of 2 were") as caught:
        move(moves)
    assert caught.value.filename == str(images[1])
    assert contents(tmp_path) == before
    move(plan(images[1:], ["cat"], tmp_path / "out"))
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("failing", ["unlink", "link"])
def test_what_was_interrupted_goes_on(tmp_path, monkeypatch, failing):
    images = write(tmp_path / "in", "a.jpg")
    moves = plan(images, ["cat"], tmp_path / "out")
    if failing == "unlink":  # ends between the two names
        with monkeypatch.context() as patch:
            patch.setattr(type(images[0]), "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                move(moves)
        assert moves[0].target.exists()
        assert images[0].exists()
    else:  # another file system

        def refuse(*_):
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)
    move(plan(images, ["cat"], tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out/cat").iterdir()] == ["a.jpg"]
    assert not images[0].exists()
    if failing == "link":
        write(tmp_path / "in", "a.jpg")
        with pytest.raises(OSError, match="File exists"):
            move(moves)
        assert images[0].exists()
        assert len(list((tmp_path / "out/cat").iterdir())) == 1


def test_what_cannot_be_sorted(tmp_path):
    images = write(tmp_path / "in", "a.jpg", "b.jpg")
    link = tmp_path / "link.jpg"
    link.symlink_to(images[0])
    for wrong in (link, tmp_path / "in", tmp_path / "none.jpg"):
        with pytest.raises(ValueError, match=r"Only plain files can be moved\. Received: .*\. Leave out"):
            plan([wrong], ["cat"], tmp_path / "out")
    with pytest.raises(ValueError, match="Every image can be moved once"):
        plan([images[0], tmp_path / "in/../in/a.jpg"], ["cat", "dog"], tmp_path / "out")
    for label in ("..", ".", ".cat", "a/b", "a\\b", " cat", "cat ", "a\0", "a\nb", 'a"b', "x" * 300):
        with pytest.raises(ValueError, match="usable as the name of a folder"):
            homes(tmp_path / "out", ["dog", label])
    for pair in (["Cat", "cat"], ["caf\u00e9", "cafe\u0301"]):
        with pytest.raises(ValueError, match="more than upper and lower case"):
            homes(tmp_path / "out", pair)
    with pytest.raises(ValueError, match=r"into folders.*a file"):
        homes(images[0], ["cat"])
    with pytest.raises(ValueError, match=r"into folders.*a file"):
        homes(tmp_path / "in", ["a.jpg"])


@pytest.fixture
def pictures(tmp_path):
    images, labels = clipmb.held_out_pictures()
    chosen = [labels.index(label) for label in ("rocket", "panda")]
    for number in chosen:
        images[number].save(tmp_path / f"{labels[number]}.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    return [tmp_path / name for name in ("rocket.png", "broken.png", "panda.png")]


def test_command(pictures, tmp_path):
    call = ["classify", *pictures, "--labels", "rocket,panda", "--move-into", tmp_path / "out"]
    shown = invoke(*call)
    assert shown.exit_code == 0, shown.output
    assert "2 of 3 images would move; --yes moves them" in shown.output
    assert all(path.exists() for path in pictures)
    assert not (tmp_path / "out").exists()
    sure = json.loads(invoke(*call, "--least", "1", "--json", "--yes").stdout)
    assert (sure["moved"], [entry["target"] for entry in sure["images"]]) == (True, [None, None])
    assert [entry["image"] for entry in sure["skipped"]] == [str(pictures[1])]
    top = invoke(*call, "--top", "1")
    assert (top.exit_code, "--top has no effect with --move-into" in top.output) == (2, True)
    done = invoke(*call, "--yes")
    assert "2 of 3 images moved" in done.output
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")) == [
        "broken.png", "out/panda/panda.png", "out/rocket/rocket.png",
    ]  # fmt: skip
    alone = invoke("classify", pictures[1], "--labels", "a,b", "--yes")
    assert alone.exit_code == 2
    assert "belong to --move-into" in alone.output
    bad = invoke("classify", pictures[1], "--labels", "a/b,b", "--move-into", tmp_path / "out")
    assert bad.exit_code == 1
    assert "usable as the name of a folder" in bad.output
    assert sorting.plan([], [], tmp_path / "out") == []


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_names_that_are_no_text_are_moved_and_shown(pictures, tmp_path):
    odd = tmp_path / os.fsdecode(b"\xff.png")
    os.rename(pictures[0], odd)
    done = invoke("classify", odd, "--labels", "rocket,panda", "--move-into", tmp_path / "out", "--yes")
    assert done.exit_code == 0, done.output
    assert r"\udcff.png" in done.output
    assert [path.name for path in (tmp_path / "out").rglob("*.png")] == [odd.name]
