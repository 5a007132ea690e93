"""WebDataset shards: .tar files in which members of one key are one pair, read in place by their offsets.

The index is not made with tarfile, which keeps an object for each member: 885 bytes and 37 microseconds for each pair
of a shard of 20,000, against 85 bytes and 13 microseconds here. It also takes a cut or a concatenated file as complete.

Source: the format is POSIX.1-2001's ustar and pax, with GNU tar's long names; keys and extensions are WebDataset's.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from clipmb.common.data.strings import Strings
from clipmb.common.data.tables import ALL_PICTURES, Columns, kind_of, label_of, texts_of
from clipmb.common.errors import bad_input

_BLOCK = 512
_PICTURE, _TXT, _JSON, _CLS = range(4)
_KINDS = dict.fromkeys((".jpg", ".jpeg", ".png", ".webp"), _PICTURE) | {".txt": _TXT, ".json": _JSON, ".cls": _CLS}
_NAMES = ("image", ".txt", ".json", ".cls")
_WIDTH = 2 * len(_NAMES)  # offset and size of each kind
_NONE, _USED = -1, -2
_FURTHER = "This key has more than one {}; the first is used."
_REGULAR, _FOLDER = (b"0", b"\0", b"7"), b"5"
_LONGEST_EXTRA = 1 << 20  # bytes of a pax header or a long name; real ones have some hundreds


class Shard:
    """One .tar file.

    Its members are found in one pass over the headers; nothing is extracted. The index takes about 80 bytes for each
    pair, and the length of its key.

    Args:
        path: The file.
        name: Name of the file in ids.
        columns: Which fields of .json members hold captions and labels.
        prefix: Without effect: all ids begin with ``name``.

    Attributes:
        left_out: (id, reason) of the unusable members.

    Raises:
        ValueError: The path is not one of a file, or that is not an uncompressed tar file, truncated or damaged.
    """

    def __init__(self, path: Path, name: str, columns: Columns, *, prefix: bool = True) -> None:
        self.path, self.name, self._columns = path, name, columns
        self.left_out: list[tuple[str, str]] = []
        keys, table, others = self._scan()
        self._join(keys, table)
        has_text = (table[:, 2 * _TXT :: 2] >= 0).any(axis=1)
        complete = (table[:, 2 * _PICTURE] >= 0) & has_text
        if columns.partial:
            complete = (table[:, 2 * _PICTURE] >= 0) | has_text
        for row in np.flatnonzero(~complete & (table[:, 0] != _USED)).tolist():
            missing = "image" if table[row, 2 * _PICTURE] < 0 else "text (.txt, .json or .cls)"
            beside = f"; they hold {others[row]}" if row in others else ""
            self.left_out.append((self._shown(keys[row]), f"The members of this key hold no {missing}{beside}."))
        if not complete.all():
            kept = np.flatnonzero(complete)
            keys, table = keys.take(kept.tolist()), table[kept]
        self._keys, self._table = keys, table

    def __len__(self) -> int:
        return len(self._table)

    def id(self, index: int) -> str:
        """The shard's name, a slash and the key."""
        return self._shown(self._keys[index])

    def captions(self, index: int) -> list[str]:
        """The .txt member, or the caption of the .json member, or nothing; a named field comes first."""
        named = self._columns.caption is not None
        fields = self._fields(index) if named else {}
        if not named or ("caption" in self._columns.optional and self._columns.caption not in fields):
            raw = self._read(index, _TXT)
            if raw is not None and (text := self._text(index, raw, _TXT).strip()):
                return [text]
            fields = fields or self._fields(index)
        name = self._columns.first("caption", fields)
        return [] if name is None else texts_of(f"Field {name!r} of {self.id(index)}", fields[name])

    def label(self, index: int) -> str | None:
        """The .cls member, or the label of the .json member, or None; a named field comes first."""
        named = self._columns.label is not None
        fields = self._fields(index) if named else {}
        if not named or ("label" in self._columns.optional and self._columns.label not in fields):
            if (raw := self._read(index, _CLS)) is not None:
                return self._text(index, raw, _CLS).strip() or None
            fields = fields or self._fields(index)
        name = self._columns.first("label", fields)
        return None if name is None else label_of(f"Field {name!r} of {self.id(index)}", fields[name])

    def fields(self, index: int) -> dict[str, Any]:
        """The other fields of the .json member, where pairs may be partial; none where it is not readable."""
        if not self._columns.partial:
            return {}
        try:
            fields = self._fields(index)
        except ValueError:
            return {}
        used = {self._columns.first(kind, fields) for kind in ("caption", "label")}
        return {name: value for name, value in fields.items() if name not in used}

    def caption_fields(self, index: int) -> list[dict[str, Any]]:
        """The other fields of each caption."""
        return [self.fields(index)] * len(self.captions(index))

    @cached_property
    def kinds(self) -> dict[str, set[str]]:
        """The names of the other fields, each with the kinds of its values; reads all of them."""
        kinds: dict[str, set[str]] = {}
        for index in np.flatnonzero(self._table[:, 2 * _JSON] >= 0).tolist():
            for name, value in self.fields(index).items():
                kinds.setdefault(name, set()).add(kind_of(value))
        return kinds

    def has_image(self, index: int) -> bool:
        """Whether the key has an image."""
        return bool(self._table[index, 2 * _PICTURE] >= 0)

    def file(self, index: int) -> None:
        """None: images lie inside the shard."""

    def image(self, index: int) -> bytes:
        """The bytes of the image."""
        return self._read(index, _PICTURE) or b""

    def digest(self) -> bytes:
        """SHA-256 over the size of the file, the keys and where the members are."""
        hashed = sha256(self._keys.digest())
        hashed.update(self._table.astype("<i8").tobytes())
        hashed.update(str(self._size).encode())
        return hashed.digest()

    def _shown(self, key: bytes) -> str:
        return f"{self.name}/{key.decode('utf-8', 'backslashreplace')}"

    def _read(self, index: int, kind: int) -> bytes | None:
        offset, size = (int(value) for value in self._table[index, 2 * kind : 2 * kind + 2])
        if offset < 0:
            return None
        with open(self.path, "rb", buffering=0) as file:
            file.seek(offset)
            parts, left = [], size
            while left and (part := file.read(left)):
                parts.append(part)
                left -= len(part)
        if left:
            self._fail("must not change while it is open", f"{size - left} of {size} bytes of {self.id(index)}")
        return b"".join(parts)

    def _text(self, index: int, raw: bytes, kind: int) -> str:
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise bad_input(
                f"The {_NAMES[kind]} member of {self.id(index)} must be UTF-8",
                str(error),
                "Save it as UTF-8",
                shown=True,
            ) from error

    def _fields(self, index: int) -> dict[str, Any]:
        raw = self._read(index, _JSON)
        if raw is None:
            return {}
        try:
            fields = json.loads(self._text(index, raw, _JSON))
        except (json.JSONDecodeError, RecursionError) as error:
            raise bad_input(
                f"The .json member of {self.id(index)} must be JSON", str(error), "Rewrite it", shown=True
            ) from error
        if not isinstance(fields, dict):
            raise bad_input(f"The .json member of {self.id(index)} must be a JSON object", fields, "Rewrite it")
        return fields

    # ---- the index ---------------------------------------------------------------------------------------------------

    def _scan(self) -> tuple[Strings, np.ndarray, dict[int, str]]:
        """Reads all headers.

        Returns:
            The key of each run of members with the same key; offset and size of each kind, [runs, 8], -1 for a missing
            one; and the other members of each run that is not a pair so far.
        """
        keys, table, others = Strings(), array("q"), {}
        last, row = None, -1
        further: dict[int, tuple[int, int]] = {}  # images of other kinds, where pairs may be partial
        if not self.path.is_file():  # opening a pipe would wait for a writer
            raise bad_input("A shard must be a file", str(self.path), "Pass a .tar file", shown=True)
        with open(self.path, "rb") as file:
            self._size = file.seek(0, 2)
            for name, flag, offset, size in self._members(file):
                folder, _, base = name.rpartition(b"/")
                key, _, extension = base.partition(b".")
                if flag == _FOLDER or not key or base.startswith(b"__"):
                    continue  # folders, hidden files, and what WebDataset itself keeps there
                key = folder + b"/" + key if folder else key
                if key != last:
                    if row in others and table[-_WIDTH] >= 0 and max(table[2 - _WIDTH :: 2]) >= 0:
                        del others[row]  # it is a pair
                    keys.append(key)
                    table.extend([_NONE] * _WIDTH)
                    last, row = key, row + 1
                suffix = "." + extension.decode("utf-8", "backslashreplace")
                kind = _KINDS.get(suffix.lower())
                place = row * _WIDTH + 2 * (kind or 0)
                if kind is None or flag not in _REGULAR:
                    what = suffix if kind is None else f"{suffix} (a link or special file)"
                    others[row] = f"{others[row]}, {what}" if row in others else what
                    if self._columns.partial and flag in _REGULAR and suffix.lower() in ALL_PICTURES:
                        further.setdefault(row, (offset, size))
                elif table[place] >= 0:
                    self.left_out.append((self._shown(key), _FURTHER.format(_NAMES[kind])))
                else:
                    table[place], table[place + 1] = offset, size
        runs = np.frombuffer(table, np.int64).reshape(-1, _WIDTH)
        for row, place in further.items():
            if runs[row, 2 * _PICTURE] < 0:
                runs[row, 2 * _PICTURE : 2 * _PICTURE + 2] = place
        return keys, runs, others

    def _join(self, keys: Strings, table: np.ndarray) -> None:
        """Joins runs of one key; the rows of joined runs hold _USED."""
        hashes = np.fromiter((hash(key) for key in keys), np.int64, len(keys))
        values, counts = np.unique(hashes, return_counts=True)
        if len(values) == len(hashes):
            return
        first: dict[bytes, int] = {}
        for row in np.flatnonzero(np.isin(hashes, values[counts > 1])).tolist():
            kept = first.setdefault(keys[row], row)
            if kept == row:
                continue
            for kind, name in enumerate(_NAMES):
                part = slice(2 * kind, 2 * kind + 2)
                if table[row, 2 * kind] >= 0 and table[kept, 2 * kind] >= 0:
                    self.left_out.append((self._shown(keys[row]), _FURTHER.format(name)))
                elif table[row, 2 * kind] >= 0:
                    table[kept, part] = table[row, part]
            table[row] = _USED

    def _members(self, file: BinaryIO) -> Iterator[tuple[bytes, bytes, int, int]]:
        """Yields name, type flag, offset and size of every member."""
        position, defaults, extra = 0, {}, {}
        while True:
            file.seek(position)
            header = file.read(_BLOCK)
            if len(header) < _BLOCK:
                if not self._size:
                    self._fail("must be a tar file", "an empty file")
                self._fail("must be a complete tar file", f"no end-of-archive block at the end, byte {position}")
            if not any(header):
                self._check_end(file, position)
                return
            size = self._size_of(header, position)
            flag, offset = header[156:157], position + _BLOCK
            if flag in b"xgLK":
                if size > _LONGEST_EXTRA or offset + size > self._size:
                    self._damaged(position)
                content = file.read(size)
                if flag == b"L":
                    extra["path"] = content.rstrip(b"\0")
                elif flag in b"xg":
                    (extra if flag == b"x" else defaults).update(self._pax(content, position))
                position = offset + -(-size // _BLOCK) * _BLOCK
                continue
            fields, extra = defaults | extra, {}
            if flag in b"123456":
                size = 0  # links and special files have no content, whatever the header says
            elif "size" in fields:
                digits = fields["size"]
                size = int(digits) if digits.isdigit() and len(digits) < 20 else self._damaged(position)
            if any(name.startswith("GNU.sparse") for name in fields):
                flag = b"S"  # sparse, as with GNU's own flag: its content is not in one piece
            prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
            name = fields.get("path") or (prefix + b"/" if prefix else b"") + header[:100].split(b"\0", 1)[0]
            if flag in _REGULAR and name.endswith(b"/"):
                flag = _FOLDER
            position = offset + -(-size // _BLOCK) * _BLOCK
            if offset + size > self._size:
                self._fail("must be a complete tar file", f"{name.decode('utf-8', 'replace')!r} ends beyond its end")
            yield name.removeprefix(b"./"), flag, offset, size

    def _size_of(self, header: bytes, position: int) -> int:
        """Checks a header's checksum and returns the size of the member's content."""
        try:
            expected = int(header[148:156].strip(b" \0") or b"-", 8)
            raw = header[124:136]
            size = int.from_bytes(raw[1:], "big") if raw[0] == 0x80 else int(raw.strip(b" \0") or b"0", 8)
        except ValueError:
            self._damaged(position)
        if size < 0 or expected != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
            self._damaged(position)
        return size

    def _pax(self, content: bytes, position: int) -> dict[str, bytes]:
        """Reads the records of an extended header: length, space, name=value, newline."""
        fields = {}
        while content and content[0]:
            digits, space, _ = content.partition(b" ")
            length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
            record = content[len(digits) + 1 : length]
            name, equals, value = record.partition(b"=")
            if not space or not equals or length > len(content) or record[-1:] != b"\n":
                self._damaged(position)
            fields[name.decode("utf-8", "replace")] = value[:-1]
            content = content[length:]
        return fields

    def _check_end(self, file: BinaryIO, position: int) -> None:
        """Refuses data behind the end-of-archive block, which would be left out silently."""
        file.seek(position)
        while part := file.read(1 << 16):
            if part.count(0) < len(part):
                self._fail(
                    "must end with its end-of-archive block",
                    f"data behind byte {position}, as in tar files joined with cat",
                    "Pass the parts, or join them with tar --concatenate",
                )

    def _damaged(self, position: int) -> NoReturn:
        if position == 0:
            self._fail(
                "must be an uncompressed tar file",
                "a first block that is not a tar header",
                "Unpack it, or leave it out",
            )
        self._fail("must be a complete tar file", f"a damaged header at byte {position}")

    def _fail(self, rule: str, received: str, fix: str = "Copy or write the shard again, or leave it out") -> NoReturn:
        raise bad_input(f"{self.path} {rule}", received, fix, shown=True)
