"""HTML from Python: every text is escaped, unless it is already `Html`."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass

VOID = ("input", "meta", "link", "br")
"""Elements without content."""
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 allows in no place, not even escaped (section 2.2); one such character makes an SVG unreadable."""


@dataclass(frozen=True, slots=True)
class Html:
    """Markup that is safe to insert as it is: made by `tag`, or drawn by this package."""

    text: str


Child = Html | str | None
Attribute = str | int | float | bool | None


def for_xml(text: str) -> str:
    """The text with a replacement character (U+FFFD) for each that XML does not allow."""
    return NOT_XML.sub("\ufffd", text)


def escape(text: str) -> str:
    """The text with the characters replaced that have a meaning in HTML or its attributes, or no place in XML."""
    return html.escape(for_xml(text), quote=True)


def tag(name: str, /, *children: Child, **attributes: Attribute) -> Html:
    """An element: children that are text are escaped, None is left out.

    An attribute's underscores become hyphens, one at the end is dropped (`class_`); True is an attribute without a
    value, None and False are none.
    """
    shown = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID:
        return Html(f"<{name}{shown}>")
    return Html(f"<{name}{shown}>{join(children).text}</{name}>")


def join(children: Iterable[Child], between: str = "") -> Html:
    """Children one after another."""
    shown = (child.text if isinstance(child, Html) else escape(child) for child in children if child is not None)
    return Html(escape(between).join(shown))


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
