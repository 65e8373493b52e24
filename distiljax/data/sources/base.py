"""What every source has in common: pieces, the options of reading, and how a record becomes documents."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from distiljax.data.document import Document
from distiljax.data.sources.spec import SourceSpec
from distiljax.errors import UserError

_LANGUAGES = (  # ISO 639-1
    "aa ab ae af ak am an ar as av ay az ba be bg bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv "
    "dz ee el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie "
    "ig ii ik io is it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv "
    "mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm "
    "rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw ta te tg th ti tk tl tn to tr ts "
    "tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu "
)
# The sentence splitter stops on white space of several bytes after a full stop: it is shown blanks.
_WIDE_BLANK = re.compile("[\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")


class Bad(Protocol):
    """Is told of text that cannot be used: raises UserError, or returns for the reader to go on without it."""

    def __call__(self, message: str, repeated: bool = False) -> None:
        """Args:
        message: one line that names the file and the line or record.
        repeated: another part of the same file says so too; such text is counted there.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part `part` of `parts` of the file `name` ("" where there are no files).

    Args:
      name: relative to the last directory that the source's location names in full, wherever that may be mounted.
      size: estimated bytes of text in the piece; the target size where it is not known.
    """

    name: str
    part: int
    parts: int
    size: int


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """What a record is turned into.

    Args:
      field: column or key that holds the text.
      unit: what one document is: "document" (a record; in .txt files a line), "line", "paragraph" or "sentence".
      language: of the text, an ISO 639-1 code; it decides where sentences end.
    """

    field: str = "text"
    unit: str = "document"
    language: str = "en"

    def __post_init__(self) -> None:
        if self.unit == "sentence" and self.language not in _LANGUAGES.split():
            raise UserError(
                f"data.language is {self.language!r}; expected an ISO 639-1 code in lower case, such as en or de"
            )


class Source(Protocol):
    """Text somewhere: divided into splits or not, and into pieces that are read independently of each other."""

    @property
    def spec(self) -> SourceSpec: ...

    @property
    def expensive(self) -> bool:
        """Whether reading twice costs much more than reading a local copy."""
        ...

    def splits(self) -> tuple[str, ...]:
        """The sorted names of the splits; () where there are none."""
        ...

    def size(self, split: str | None) -> int:
        """Estimated bytes of text; 0 where they are not known."""
        ...

    def pieces(self, split: str | None, target: int) -> list[Piece]:
        """The pieces in order, each of at most about `target` bytes where it can be cut."""
        ...

    def read(self, split: str | None, piece: Piece, options: ReadOptions, bad: Bad) -> Iterator[Document]:
        """The documents of a piece: the same each time, and each document of the source in exactly one piece.

        Args:
          bad: called for every record that cannot be used; it raises, or returns to go on with the next record, or with
            the end of the piece if the rest cannot be read.
        """
        ...


def number_of_parts(size: int, target: int, most: int | None = None) -> int:
    """How many pieces of at most `target` bytes so much text is cut into."""
    parts = max(1, -(-size // max(1, target)))
    return min(parts, most) if most is not None else parts


def equal_pieces(name: str, parts: int, size: int | None, target: int) -> list[Piece]:
    """A file's pieces; one of unknown size (None) counts as much as fits in a unit of work, for it may be long."""
    each = target if size is None else size // parts
    return [Piece(name, part, parts, each) for part in range(parts)]


def share(total: int, part: int, parts: int) -> tuple[int, int]:
    """Begin and end of a part of `total` things."""
    return total * part // parts, total * (part + 1) // parts


def check_split(source: str, split: str | None, names: tuple[str, ...]) -> None:
    """Raises UserError for a split that is not there."""
    if split is None and not names or split in names:
        return
    has = f"it has {', '.join(names)}" if names else "it is not divided into splits"
    what = f"no split {split!r}" if split is not None else "several splits"
    raise UserError(f"{source} has {what}; {has}")


def record_documents(
    text: Any, options: ReadOptions, where: Callable[[], str], bad: Bad, group: str | None = None
) -> Iterator[Document]:
    """A record as documents; those of one record are one group.

    Args:
      text: a string, bytes that are UTF-8, or None for a record without text.
      where: gives the record's name in a message.
      group: the documents' group, if it is not the record's text.
    """
    if text is None:
        return
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            bad(f"{where()} is not UTF-8 (byte {text[error.start]:#04x}); convert the text to UTF-8")
            return
    if not isinstance(text, str):
        bad(f"{where()}: the text is of type {type(text).__name__}, expected a string")
        return
    try:
        parts = cut(text, options)
    except ValueError as error:
        bad(f"{where()} cannot be cut into sentences: {first_line(error)}")
        return
    for part in parts:
        if part and not part.isspace():
            yield Document(part, text if group is None else group)


def cut(text: str, options: ReadOptions) -> list[str]:
    """A record's text by unit; parts may be blank."""
    if options.unit == "line":
        return [line.rstrip("\r") for line in text.split("\n")]  # as in .txt files
    if options.unit == "paragraph":
        return re.split(r"\n(?:[ \t\r]*\n)+", text)
    if options.unit == "sentence":
        return _sentences(text, options.language)
    return [text]


def _sentences(text: str, language: str) -> list[str]:
    import sentencex

    simple = text if text.isascii() else _WIDE_BLANK.sub(" ", text)
    try:
        found = list(sentencex.segment(language, simple))
    except BaseException as error:
        # A panic of the Rust code is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(first_line(error)) from None
    if simple is not text:
        ends = 0
        for index, sentence in enumerate(found):
            found[index] = text[ends : ends + len(sentence)]
            ends += len(sentence)
    return [sentence.strip() for sentence in found]


def no_field(where: str, field: str, fields: Iterable[str]) -> str:
    """The message for a record or a table without the field."""
    names = " ".join(", ".join(list(fields)[:20]).split())
    names = names.encode("utf-8", "backslashreplace").decode("utf-8")
    return f"{where} has no field {field!r}; it has {names or 'none'}: set data.text_field or ?field="


def unreachable(error: BaseException) -> bool:
    """Whether an error is the file system's or the network's, not the data's: going on would lose text silently."""
    return isinstance(error, OSError) and (
        error.errno is not None
        or isinstance(error, (FileNotFoundError, PermissionError, TimeoutError, ConnectionError))
    )


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
