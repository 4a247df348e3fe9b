"""HTML in which every text is escaped, whoever wrote it: names in a record come from files of strangers."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from lora_merge.errors import printable


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(name: str, content: str | Iterable[str] = "", /, **attributes: str | int | None) -> Html:
    """`<name attributes>content</name>`.

    content: texts are escaped, `Html` is not. attributes: `class_` and `data_what` are written `class` and `data-what`;
    None is left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>{joined(content)}</{name}>")


def joined(content: str | Iterable[str]) -> Html:
    """Texts, escaped, and `Html`, one after the other."""
    if isinstance(content, Html):
        return content
    if isinstance(content, str):
        return Html(_escaped(content))
    return Html("".join(map(joined, content)))


def void(name: str, /, **attributes: str | int | None) -> Html:
    """An element that has no content and no end, `<br>`."""
    return Html(element(name, "", **attributes).removesuffix(f"</{name}>"))


def code(text: str) -> Html:
    """A name, which a browser may break after each dot, slash and underscore."""
    pieces: list[str] = []
    for piece in _pieces(printable(text)):
        pieces += [piece, Html("<wbr>")]
    return element("code", pieces[:-1])


def _pieces(text: str) -> Iterable[str]:
    start = 0
    for place, character in enumerate(text):
        if character in "./_" and place + 1 < len(text):
            yield text[start : place + 1]
            start = place + 1
    yield text[start:]


def _escaped(text: str) -> str:
    return escape(printable(text), quote=True)
