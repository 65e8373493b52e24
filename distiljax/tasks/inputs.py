"""What `predict` reads: lines of text or of JSON, what each head needs of them, and words of plain text."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from distiljax.data.sources.base import first_line
from distiljax.errors import UserError
from distiljax.hub.heads import MASKED_LM
from distiljax.nn.heads import ANSWERS, SEQUENCES, TOKENS
from distiljax.tasks.labels import listed, shown

FORMATS = ("auto", "text", "jsonl")
EXPECTED = {
    MASKED_LM: '{"text": "… [MASK] …"}',
    SEQUENCES: '{"text": "…"} or {"text": "…", "text_pair": "…"}',
    TOKENS: '{"text": "…"} or {"tokens": ["…", …]}',
    ANSWERS: '{"question": "…", "context": "…"}',
}
"""A JSON object of each kind of input, as messages show it; every kind may have an "id" too."""

_FIELDS = {
    MASKED_LM: ("text",),
    SEQUENCES: ("text", "text_pair"),
    TOKENS: ("text",),
    ANSWERS: ("question", "context"),
}


def read_inputs(
    file: str | None, arguments: Sequence[str] = (), format: str = "auto"
) -> Iterator[tuple[str, str | dict[str, Any]]]:
    """Texts or JSON objects, one a line, as they are asked for; empty lines are left out.

    Args:
      file: its path; standard input where it is None and there are no `arguments`.
      arguments: texts (or JSON objects) of the command line, in place of lines.
      format: "text", "jsonl", or "auto": JSON where the first one begins as a JSON object does.

    Returns:
      An iterator over (where it stands, for messages; the text or object). It raises UserError at a line that is no
      UTF-8 or no JSON object, with its number.

    Raises:
      UserError: a file that cannot be read, both a file and arguments, or another format.
    """
    if format not in FORMATS:
        raise UserError(f"format is {format!r}; expected {', '.join(FORMATS)}")
    if file and arguments:
        raise UserError("give texts either as arguments or with --file")
    if arguments:
        # An argument that is no UTF-8 reaches Python with surrogates: `as_input` replaces them.
        return _parsed(((f"argument {n}", text) for n, text in enumerate(arguments, 1)), format)
    return _parsed(_lines(_open(file) if file else _standard_input(), file or "standard input"), format)


def count_inputs(file: str) -> int:
    """How many inputs `read_inputs` gives for a file: its lines that are not empty."""
    with _open(file) as source:
        return sum(1 for line in source if line.strip())


def as_input(
    item: str | Mapping[str, Any], kind: str, where: str, defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What the model's head needs of one input, checked.

    Args:
      item: a text, or an object with the fields of `EXPECTED` and possibly "id"; other fields are left out.
      kind: of the head, as `HeadConfig.kind`, or "masked_lm".
      where: the input's place, for messages.
      defaults: fields that `item` may lack, such as the same question for every text. A plain text of question
        answering is the context where the question is given here, and the other way round.

    Raises:
      UserError: a field that is missing or of another type.
    """
    defaults = defaults or {}
    if isinstance(item, str):
        item = {_plain_field(kind, where, defaults): item}
    if not isinstance(item, Mapping):
        raise UserError(f"{where} is a {_json_kind(item)}; expected a text or {EXPECTED[kind]}")
    item = {**defaults, **item}
    result = {"id": item["id"]} if "id" in item else {}
    # Words that are given go before the text that they are of.
    fields = ("tokens",) if kind == TOKENS and item.get("tokens") is not None else _FIELDS[kind]
    for field in fields:
        value = item.get(field)
        if value is None and field == "text_pair":
            continue
        if value is None:
            if field in item:
                raise UserError(f"{where}: {field!r} is null; expected a string, as in {EXPECTED[kind]}")
            has = listed(item, shown) or "no fields"
            raise UserError(f"{where} has no {field!r} (it has {has}); expected {EXPECTED[kind]}")
        result[field] = _checked(value, field, kind, where)
    return result


def read_defaults(
    question: str | None = None, context: str | None = None, text_pair: str | None = None
) -> dict[str, str]:
    """The `defaults` of `as_input` from flags of the command line; `context` is a file.

    Raises:
      UserError: flags that exclude one another, or a file that cannot be read.
    """
    if sum(value is not None for value in (question, context, text_pair)) > 1:
        raise UserError("give one of --question, --context and --text_pair; the texts are the other side")
    if context is not None:
        return {"context": _read_text(context)}
    given = {"question": question, "text_pair": text_pair}
    return {field: value for field, value in given.items() if value is not None}


def needed_head(defaults: Mapping[str, Any]) -> str:
    """The kind of head that goes with such defaults, or "any"."""
    kinds = (kind for kind in (SEQUENCES, ANSWERS) for field in defaults if field in _FIELDS[kind])
    return next(kinds, "any")


def _plain_field(kind: str, where: str, defaults: Mapping[str, Any]) -> str:
    if kind != ANSWERS:
        return "text"
    given = [field for field in _FIELDS[ANSWERS] if field in defaults]
    if len(given) != 1:
        raise UserError(
            f"{where} is plain text, and the model answers questions; expected --question=QUESTION with contexts as "
            f"texts, --context=FILE with questions as texts, or JSON lines {EXPECTED[ANSWERS]}"
        )
    return "context" if given == ["question"] else "question"


def _checked(value: Any, field: str, kind: str, where: str) -> str | list[str]:
    if field == "tokens":
        if not isinstance(value, list | tuple) or not all(isinstance(token, str) for token in value):
            raise UserError(f"{where}: 'tokens' is {_shown(value)}; expected a list of strings")
        return [_without_surrogates(token) for token in value]
    if not isinstance(value, str):
        raise UserError(f"{where}: {field!r} is {_shown(value)}; expected a string, as in {EXPECTED[kind]}")
    return _without_surrogates(value)


def _without_surrogates(text: str) -> str:
    """No tokenizer takes them: "?" stands in for each, so that offsets stay."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _json_kind(value: Any) -> str:
    names = {bool: "boolean", int: "number", float: "number", list: "list", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _read_text(file: str) -> str:
    with _open(file, "context") as source:
        try:
            return source.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file} is not UTF-8 (byte {error.start + 1}: {error.reason}); convert it first"
            ) from None


def _open(file: str, flag: str = "file") -> Any:
    try:
        return open(file, "rb")
    except OSError as error:
        raise UserError(
            f"--{flag} {file} cannot be read ({error.strerror}); give a text file"
            + (", one text a line" if flag == "file" else "")
        ) from None


def _standard_input() -> Any:
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():  # None: closed by the shell
        raise UserError("no text; give it as an argument, with --file, or on standard input")
    return contextlib.nullcontext(sys.stdin.buffer)


def _lines(source: Any, name: str) -> Iterator[tuple[str, str]]:
    number = 0
    with source as lines:
        try:
            for number, line in enumerate(lines, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield f"line {number} of {name}", text.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(
                f"line {number} of {name} is not UTF-8 (byte {error.start + 1}: {error.reason}); convert it first"
            ) from None


def _parsed(lines: Iterable[tuple[str, str]], format: str) -> Iterator[tuple[str, str | dict[str, Any]]]:
    as_json = format == "jsonl"
    for number, (where, text) in enumerate(lines):
        if number == 0 and format == "auto":
            as_json = re.match(r'\s*\{\s*["}]', text) is not None
        yield where, _object(text, where) if as_json else text


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
        # The id comes back as JSON, which has no NaN and no infinity.
        json.dumps(value.get("id") if isinstance(value, dict) else None, allow_nan=False)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            reason = error.msg
        else:
            long = "digits" in str(error) and "a number of too many digits"
            reason = long or ("nested too deeply" if isinstance(error, RecursionError) else first_line(error))
        raise UserError(
            f"{where} is no JSON ({reason}); expected one object a line, or --format=text"
        ) from None
    if not isinstance(value, dict):
        raise UserError(
            f"{where} is a JSON {_json_kind(value)}; expected one object a line, or --format=text"
        )
    return value


# Words of plain text. ----------------------------------------------------------------------------------------------

_IDEOGRAPHS = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"
_CHUNK = re.compile(rf"[{_IDEOGRAPHS}]|[^\s{_IDEOGRAPHS}]+")
_INNER = re.compile(r"[()\[\]{}<>\"“”«»;!?…—]+|--+|\.{2,}|,(?!\d)")
_RUN = re.compile(r"(.)\1*", re.S)
_ABBREVIATION = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")
_CLITIC = re.compile(r".+(?=['’][sS]$)", re.S)


def split_words(text: str) -> list[tuple[int, int]]:
    """The words of a plain text, as [begin, end) character offsets.

    As data sets of named entities have them (CoNLL, WNUT): split at white space, each ideograph a word, punctuation
    at a word's ends and a final 's split off, runs of one character together. What is inside a word stays
    (AT&T, 1,000, o'clock), but for brackets, quotes and dashes; @user, #tag, U.S. and addresses of web pages are words.
    """
    words: list[tuple[int, int]] = []
    for chunk in _CHUNK.finditer(text):
        begin, end = chunk.span()
        if begin + 1 == end or chunk[0].isalnum():
            words.append((begin, end))
        else:
            words += _split_chunk(text, begin, end)
    return words


def _split_chunk(text: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
    inner = None if "://" in text[begin:end] else _INNER.search(text, begin, end)
    while inner is not None:
        yield from _split_ends(text, begin, inner.start())
        yield from _runs(text, *inner.span())
        begin = inner.end()
        inner = _INNER.search(text, begin, end)
    yield from _split_ends(text, begin, end)


def _split_ends(text: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
    first, last = begin, end
    while first < end and _is_punctuation(text[first]):
        first += 1
    while last > first and _is_punctuation(text[last - 1]):
        last -= 1
    if first == last:  # nothing but punctuation
        yield from _runs(text, begin, end)
        return
    if first > begin and text[first - 1] in "@#":
        first -= 1
    if last < end and text[last] == "." and _ABBREVIATION.fullmatch(text, first, last):
        last += 1
    yield from _runs(text, begin, first)
    if (owner := _CLITIC.match(text, first, last)) is not None:
        yield first, owner.end()
        first = owner.end()
    yield first, last
    yield from _runs(text, last, end)


def _runs(text: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
    return (run.span() for run in _RUN.finditer(text, begin, end))


def _is_punctuation(character: str) -> bool:
    """As BERT's tokenizer has it: Unicode's punctuation and the symbols of ASCII."""
    if character.isalnum():
        return False
    return character in "$+<=>^`|~" or unicodedata.category(character).startswith("P")
