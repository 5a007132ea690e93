"""Turns emoji artwork from npm packages into images with captions: 64x64 PNG files and one JSONL file.

    python examples/emoji/prepare.py node_modules build/emoji/data

README.md beside this file has the npm command. What is written:

    labels.json              the emoji of Unicode, in its order: [{"hexcode", "label", "tags", "group"}, ...]
    images.jsonl           one line for each image: file_name, artist, hexcode, label, tags, split
    <artist>/<hexcode>.png   64x64, RGBA

Skin tones, regional indicators and hair components are left out. Most sets say which emoji an image shows by code
point (chars.json); the others are matched by name.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import resvg_py
from PIL import Image

SIZE = 64
# The licences of all sets are in the README of the model. HELD_OUT is never trained on.
TRAINING = ("noto", "noto-v1", "fxemoji", "fluent-emoji", "fluent-emoji-flat", "fluent-emoji-high-contrast")
FLAGS = {"flag": "{}-4x3", "circle-flags": "{}", "flagpack": "{}"}
HELD_OUT = ("twemoji", "emojione", "openmoji")
# Sets without chars.json whose images carry the names of a set that has one.
NAMED_AS = {"fluent-emoji": "fluent-emoji-flat"}


@dataclass(frozen=True)
class Emoji:
    """An emoji of Unicode: its code points, its CLDR name and keywords, and its group."""

    hexcode: str
    label: str
    tags: tuple[str, ...]
    group: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("node_modules", type=Path, help="the folder that npm installed into")
    parser.add_argument("out", type=Path, help="the folder to write")
    arguments = parser.parse_args()
    emoji = read_emoji(arguments.node_modules)
    matcher = Matcher(arguments.node_modules, emoji)
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for artist in (*TRAINING, *FLAGS, *HELD_OUT):
        icons = read_icons(arguments.node_modules, artist)
        matches = matcher.matches(artist, icons)
        (arguments.out / artist).mkdir(exist_ok=True)
        with ThreadPoolExecutor() as threads:
            drawn = list(threads.map(render, [icon for _, icon in matches]))
        for (found, _), picture in zip(matches, drawn, strict=True):
            (arguments.out / artist / f"{found.hexcode}.png").write_bytes(picture)
        lines += [
            {
                "file_name": f"{artist}/{found.hexcode}.png",
                "artist": artist,
                "hexcode": found.hexcode,
                "label": found.label,
                "tags": list(found.tags),
                "split": "held out" if artist in HELD_OUT else "train",
            }
            for found, _ in matches
        ]
        print(f"{artist}: {len(matches)} images of {len(emoji)} emoji")
    write_lines(arguments.out / "images.jsonl", lines)
    labels = [{"hexcode": e.hexcode, "label": e.label, "tags": list(e.tags), "group": e.group} for e in emoji]
    (arguments.out / "labels.json").write_text(json.dumps(labels, ensure_ascii=False, indent=0) + "\n", "utf-8")


def read_emoji(node_modules: Path) -> list[Emoji]:
    """Reads the emoji of Unicode with their English names and keywords."""
    folder = node_modules / "emojibase-data"
    groups = json.loads((folder / "meta/groups.json").read_text("utf-8"))["groups"]
    return [
        Emoji(entry["hexcode"], entry["label"], tuple(entry.get("tags", ())), groups[str(entry["group"])])
        for entry in json.loads((folder / "en/data.json").read_text("utf-8"))
        if "group" in entry and groups[str(entry["group"])] != "component"
    ]


def read_icons(node_modules: Path, artist: str) -> dict[str, dict]:
    """Reads a set: name to {"body", "left", "top", "width", "height"}, aliases and hidden icons included."""
    content = json.loads((node_modules / "@iconify-json" / artist / "icons.json").read_text("utf-8"))
    defaults = {key: content.get(key, default) for key, default in (("left", 0), ("top", 0), ("width", 16))}
    defaults["height"] = content.get("height", 16)
    icons = {name: {**defaults, **icon} for name, icon in content["icons"].items()}
    for name, alias in content.get("aliases", {}).items():
        if set(alias) == {"parent"} and alias["parent"] in icons:  # none that turns or mirrors its parent
            icons.setdefault(name, icons[alias["parent"]])
    return icons


def render(icon: dict) -> bytes:
    """Draws an icon in the middle of a square: PNG bytes."""
    side = max(icon["width"], icon["height"])
    left, top = icon["left"] - (side - icon["width"]) / 2, icon["top"] - (side - icon["height"]) / 2
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="{left} {top} {side} {side}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    if image.size != (SIZE, SIZE):
        raise SystemExit(f"an image came out as {image.size}")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


class Matcher:
    """Returns which emoji an image of a set shows."""

    def __init__(self, node_modules: Path, emoji: list[Emoji]) -> None:
        self.node_modules = node_modules
        self.emoji = {entry.hexcode: entry for entry in emoji}
        self.by_code = {code_points(entry.hexcode): entry.hexcode for entry in emoji}
        self.by_name = self._names()

    def matches(self, artist: str, icons: dict[str, dict]) -> list[tuple[Emoji, dict]]:
        """Returns one icon for each emoji that the set has."""
        found: dict[str, dict] = {}
        if artist in FLAGS:
            for hexcode in self.emoji:
                name = FLAGS[artist].format(country(hexcode))
                if country(hexcode) and name in icons:
                    found[hexcode] = icons[name]
        elif codes := self._codes(NAMED_AS.get(artist, artist)):
            for code, name in codes.items():
                hexcode = self.by_code.get(code_points(code))
                if hexcode and name in icons:
                    found.setdefault(hexcode, icons[name])
        else:
            for name, icon in icons.items():
                hexcode = self.by_name.get(plain(name))
                if hexcode:
                    found.setdefault(hexcode, icon)
        return [(self.emoji[hexcode], found[hexcode]) for hexcode in self.emoji if hexcode in found]

    def _codes(self, artist: str) -> dict[str, str]:
        path = self.node_modules / "@iconify-json" / artist / "chars.json"
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}

    def _names(self) -> dict[str, str]:
        """Every name an emoji goes by to its hexcode; CLDR's names come before the others."""
        names: dict[str, str] = {}

        def add(name: str, hexcode: str | None) -> None:
            if hexcode in self.emoji:
                names.setdefault(plain(name), hexcode)

        for entry in self.emoji.values():
            add(entry.label, entry.hexcode)
            if entry.label.startswith("flag: "):
                add(entry.label.replace("flag: ", "flag for flag "), entry.hexcode)
                add(entry.label.replace("flag: ", "flag for "), entry.hexcode)
        for artist in ("noto", "fluent-emoji-flat"):
            for code, name in self._codes(artist).items():
                add(name, self.by_code.get(code_points(code)))
        folder = self.node_modules / "emojibase-data"
        for path in (
            "meta/unicode-names.json",
            *(f"en/shortcodes/{kind}.json" for kind in ("cldr", "github", "iamcal")),
        ):
            for code, given in json.loads((folder / path).read_text("utf-8")).items():
                for name in [given] if isinstance(given, str) else given:
                    add(name, self.by_code.get(code_points(code)))
        return names


def plain(name: str) -> str:
    """A name without what the sets write differently: case, accents, punctuation and spaces."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("&", "and").replace("’", "").replace("ô", "o"))


def code_points(code: str) -> tuple[int, ...]:
    """Code points without variation selectors, which the sets treat differently."""
    return tuple(point for point in (int(part, 16) for part in code.split("-")) if point != 0xFE0F)


def country(hexcode: str) -> str:
    """The ISO code of a flag, for example "fr" or "gb-wls"; empty for other emoji."""
    points = code_points(hexcode)
    if len(points) == 2 and all(0x1F1E6 <= point <= 0x1F1FF for point in points):
        return "".join(chr(point - 0x1F1E6 + ord("a")) for point in points)
    if points[0] == 0x1F3F4 and len(points) > 3 and points[-1] == 0xE007F:
        letters = "".join(chr(point - 0xE0000) for point in points[1:-1])
        return f"{letters[:2]}-{letters[2:]}"
    return ""


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")


if __name__ == "__main__":
    main()
