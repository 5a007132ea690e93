"""Search results as one HTML file that needs no other."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from clipmb.common.image import pixels as px
from clipmb.common.image.resampling import as_image

_SIDE = 240  # pixels
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ font: 16px/1.4 system-ui, sans-serif; margin: 1rem; background: Canvas; color: CanvasText; }}
  ol {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1rem; }}
  ol {{ padding: 0; list-style: none; }}
  img {{ max-width: 100%; height: auto; border-radius: .3rem; }}
  p {{ margin: .2rem 0; overflow-wrap: anywhere; }}
  .score {{ font-variant-numeric: tabular-nums; font-weight: 600; }}
</style>
<h1>{title}</h1>
<ol>
{items}
</ol>
</html>
"""


def gallery(title: str, hits: Sequence[Mapping[str, Any]]) -> str:
    """Returns a page with a thumbnail, the score, and the name or caption of each result.

    Args:
        title: What was searched for.
        hits: Results of `Index.search`. Those whose image cannot be read have no thumbnail.
    """
    items = "\n".join(f"<li>{_thumbnail(hit)}{_about(hit)}</li>" for hit in hits)
    return _PAGE.format(title=html.escape(title), items=items)


def _about(hit: Mapping[str, Any]) -> str:
    lines = [str(hit[name]) for name in ("caption", "label", "id") if hit.get(name)]
    shown = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    return f'<p class="score">{hit["score"]:.3f}</p>{shown}'


def thumbnail(path: str) -> tuple[bytes, int, int] | None:
    """Returns an image as a small JPEG file, with its width and height in pixels; None where it cannot be read."""
    try:
        picture = as_image(px.read_image(path, path))
    except (ValueError, OSError):
        return None
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=85)
    return buffer.getvalue(), picture.width, picture.height


def _thumbnail(hit: Mapping[str, Any]) -> str:
    if not hit.get("path"):
        return ""
    if (made := thumbnail(hit["path"])) is None:
        return "<p>(no image)</p>"
    content, width, height = made
    source = base64.b64encode(content).decode()
    name = html.escape(str(hit["id"]), quote=True)
    return f'<img src="data:image/jpeg;base64,{source}" alt="{name}" width="{width}" height="{height}">'
