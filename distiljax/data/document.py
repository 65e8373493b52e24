"""What a source gives."""

from __future__ import annotations

from typing import NamedTuple


class Document(NamedTuple):
    """A document, and the key that decides whether it is held out: documents of one group stay together."""

    text: str
    group: str
