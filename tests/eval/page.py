"""The report read back as a browser would see it."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

import PIL.Image

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Table cells, pictures, texts by tag and class, all tags and links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.images: list[tuple[str, PIL.Image.Image]] = []
        self.texts: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self._open: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self._open, "a tag is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.links += [v or "" for name, v in attrs if name in ("src", "href")]
        if tag == "img":
            kind, data = (values["src"] or "").split(",")
            assert kind == "data:image/png;base64"
            image = PIL.Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            assert image.format == "PNG"
            self.images.append((values.get("class") or "", image.convert("RGB")))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self._open.append((tag, values.get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if not self._open or not data.strip():
            return
        self.texts.append((*self._open[-1], data.strip()))
        if any(tag in ("td", "th") for tag, _ in self._open):
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data.strip()}".strip()

    def of(self, tag: str, kind: str = "") -> list[str]:
        """Texts directly within a tag of a class."""
        return [text for t, k, text in self.texts if (t, k) == (tag, kind)]
