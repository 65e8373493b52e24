"""How a source is spelled: LOCATION[?key=value[&key=value…]]."""

from __future__ import annotations

import dataclasses
import math
import re

from distiljax.errors import UserError

KEYS = ("split", "field", "weight", "streaming", "data_dir")
_SUFFIX = re.compile(rf"\?(?=(?:{'|'.join(KEYS)})=)")
# What looks like a suffix too, though none of its keys is known: a misspelled key rather than a glob or a web address.
_MISSPELLED = re.compile(r"\?(?=[A-Za-z_]+=[^*?/\[]*$)")


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """A source and its own settings; None is what the data config says.

    Args:
      text: the source as it was spelled.
      location: where the text is: docstrings, a path, a glob, a directory, hf:NAME or tfds:NAME.
      split: the split that is read for training.
      field: column or key that holds the text.
      weight: share of the rows drawn from this source, relative to the other sources' weights.
      streaming: read a data set of the hub over the network, without a copy on disk.
      data_dir: where a tfds data set is prepared.
    """

    text: str
    location: str
    split: str | None = None
    field: str | None = None
    weight: float | None = None
    streaming: bool = False
    data_dir: str | None = None


def parse(text: str) -> SourceSpec:
    """A source's spelling taken apart; `?` begins the settings only before one of their keys, else it is a glob's.

    Raises:
      UserError: a key is unknown or given twice, or a value is none of its kind.
    """
    mark = _suffix_start(text)
    if mark is None:
        return SourceSpec(text, text)
    location = text[:mark]
    values: dict[str, str] = {}
    for setting in text[mark + 1 :].split("&"):
        key, equals, value = setting.partition("=")
        if key not in KEYS:
            raise UserError(
                f"data source {text}: {key!r} is not a setting; expected one of {', '.join(KEYS)}"
            )
        if not equals or not value:
            raise UserError(f"data source {text}: {key} has no value; expected {key}=VALUE")
        if key in values:
            raise UserError(f"data source {text}: {key} is given twice; expected one {key}=VALUE")
        values[key] = value
    if not location:
        raise UserError(
            f"data source {text} names no text; expected a location before the ?, such as corpus.jsonl?…"
        )
    for key, prefix in (("streaming", "hf:"), ("data_dir", "tfds:")):
        if key in values and not location.startswith(prefix):
            raise UserError(f"data source {text}: {key} is for {prefix}NAME only; leave it out")
    return SourceSpec(
        text,
        location,
        split=values.get("split"),
        field=values.get("field"),
        weight=_weight(text, values["weight"]) if "weight" in values else None,
        streaming=_switch(text, "streaming", values.get("streaming", "0")),
        data_dir=values.get("data_dir"),
    )


def _suffix_start(text: str) -> int | None:
    if match := _SUFFIX.search(text):
        return match.start()
    if text.startswith(("hf:", "tfds:", "docstrings?")):
        return text.find("?") if "?" in text else None
    match = _MISSPELLED.search(text)
    return match.start() if match and not text.startswith(("http://", "https://")) else None


def _weight(text: str, value: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise UserError(
            f"data source {text}: the weight is {value!r}; expected a number above 0, such as 0.5"
        )
    return weight


def _switch(text: str, key: str, value: str) -> bool:
    if value not in ("0", "1", "true", "false"):
        raise UserError(f"data source {text}: {key} is {value!r}; expected 1 or 0")
    return value in ("1", "true")
