"""Several files as one list of pairs: patterns, folders, names, fingerprints."""

from __future__ import annotations

import pytest
from data_cases import folder_of, pair, tar_of

from clipmb.common.data.pairs import Pairs


def test_patterns_folders_and_lists(tmp_path):
    for i in range(3):
        tar_of(tmp_path / f"s-{i:03d}.tar", pair(str(i), "x"))
    (tmp_path / "s-000.parquet").write_bytes(b"what img2dataset writes beside its shards")
    expected = [f"s-{i:03d}.tar/{i}" for i in range(3)]
    for path in (
        tmp_path,
        str(tmp_path / "s-{000..002}.tar"),
        f"{tmp_path}/s-*.tar",
        f"{tmp_path}/*-{{000,001,002}}.t[a]r",
        [tmp_path / "s-000.tar", f"{tmp_path}/s-00[12].tar"],
    ):
        pairs = Pairs.open(path)
        assert [pairs.id(i) for i in range(len(pairs))] == expected, path
    assert Pairs.open(f"{tmp_path}/s-{{2..0}}.tar".replace("s-", "s-00")).id(0) == "s-002.tar/2"
    assert repr(pairs) == "Pairs(3 in s-000.tar, s-001.tar, s-002.tar)"


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tar_of(tmp_path / name / "s.tar", pair("0", name))
        (tmp_path / name / "captions.csv").write_text(f"image,caption\n0.jpg,{name}\n", "utf-8")
    pairs = Pairs.open([f"{tmp_path}/*/s.tar", tmp_path / "a", tmp_path / "b"])
    assert [pairs.id(i) for i in range(4)] == ["a/s.tar/0", "b/s.tar/0", "a/captions.csv/0.jpg", "b/captions.csv/0.jpg"]
    assert [pairs.captions(i) for i in range(4)] == [["a"], ["b"], ["a"], ["b"]]


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("none", FileNotFoundError, "none, which does not exist"),
        ("*.tar", FileNotFoundError, "which matches no file"),
        ("s-{0..2}.tar", FileNotFoundError, r"s-2\.tar \(of .*s-\{0\.\.2\}\.tar\), which does not exist"),
        ("{0..9999999}.tar", ValueError, "at most 1000000 files"),
        ("{0..999}{0..999}{0..9}.tar", ValueError, "at most 1000000 files"),
        ("x.tar.gz", ValueError, "Expected a .csv, .tsv, .jsonl, .parquet, .json, .token or uncompressed .tar file"),
        ("two", ValueError, "A folder must hold one table. Received: captions.csv, metadata.jsonl"),
        ("empty", FileNotFoundError, "A folder of pairs must hold a table .* Received: no files"),
    ],
)
def test_paths_that_name_no_pairs(tmp_path, path, kind, message):
    for i in range(2):
        tar_of(tmp_path / f"s-{i}.tar", pair("0", "x"))
    (tmp_path / "x.tar.gz").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "captions.csv").touch()
    (tmp_path / "two" / "metadata.jsonl").touch()
    path = path if path != "*.tar" else "empty/*.tar"
    with pytest.raises(kind, match=message):
        Pairs.open(f"{tmp_path}/{path}")


def test_a_file_is_given_once_and_by_a_path(tmp_path):
    path = tar_of(tmp_path / "s.tar", pair("0", "x"))
    with pytest.raises(ValueError, match="A file may be given only once"):
        Pairs.open([path, f"{tmp_path}/*.tar"])
    for wrong in ([3], 3, "", [""], None, b"s.tar"):
        with pytest.raises(TypeError, match="Files of pairs must be given as paths"):
            Pairs.open(wrong)
    with pytest.raises(ValueError, match="at least one file"):
        Pairs.open([])


def test_the_fingerprint_changes_with_the_pairs_only(tmp_path):
    prints = set()

    def add(new=True):
        before = len(prints)
        prints.add(Pairs.open(tmp_path / "d").fingerprint)
        assert len(prints) == before + new

    folder_of(tmp_path / "d", 3)
    add()
    table = tmp_path / "d" / "captions.jsonl"
    lines = table.read_text("utf-8")
    table.write_text(lines.replace("picture 1", "picture 7"), "utf-8")
    add()
    table.write_text(lines.replace("002.jpg", "012.jpg"), "utf-8")
    add()
    table.write_text("\n".join(lines.splitlines()[::-1]), "utf-8")
    add()
    table.write_text("\n".join(lines.splitlines()[:2]), "utf-8")
    add()
    table.write_text(lines.replace('"}', '", "label": "x"}'), "utf-8")
    add()
    table.write_text(lines, "utf-8")
    add(new=False)
    (tmp_path / "d").rename(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "d")
    assert Pairs.open([table]).fingerprint in prints
    table.unlink()
    for members in ([*pair("0", "a"), *pair("1", "b")], [*pair("0", "a")], [*pair("0", "aa")], [*pair("1", "a")]):
        tar_of(tmp_path / "d" / "s.tar", members)
        add()
    (tmp_path / "d" / "s.tar").rename(tmp_path / "d" / "t.tar")
    add()
