"""Which of a model's outputs stands for which class of the data, by the labels' names."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from distiljax.errors import UserError

log = logging.getLogger(__name__)

_SHOWN = 10  # labels that a message lists


def label_order(own: Sequence[str], wanted: Sequence[str], where: str) -> list[int] | None:
    """The positions of the wanted labels among a model's outputs; None where these are the wanted ones in their order.

    Labels are the same by name, in any case. Only where one side has no names, position decides: data whose labels are
    ids (0, 1, …), or a model whose labels are LABEL_0, LABEL_1, ….

    Args:
      own: the model's labels, by output.
      wanted: the data's labels, by class id. The model may have more.
      where: the model, for messages.

    Raises:
      UserError: a label that the model does not have.
    """
    order = _by_name(own, wanted)
    if order is None:
        order = _by_position(own, wanted)
        if order is None:
            raise UserError(
                f"{where} has the labels {_listed(own)}, the data {_listed(wanted)}; expected labels that the model "
                "has: take one that was fine-tuned on them, or name them alike"
            )
        log.warning(
            "%s calls its labels %s; they are taken as %s, by their position",
            *(where, _listed([own[place] for place in order]), _listed(wanted)),
        )
    return None if order == list(range(len(own))) else order


def _by_name(own: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    for same in (str, str.casefold):
        names, found = list(map(same, own)), list(map(same, wanted))
        if set(found) <= set(names) and len(set(names)) == len(names) and len(set(found)) == len(found):
            return [names.index(label) for label in found]
    return None


def _by_position(own: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    matches = [re.fullmatch(r"(?:label_)?(\d+)", label.casefold()) for label in wanted]
    ids = [int(match[1]) for match in matches if match]
    if len(ids) == len(wanted) and max(ids) < len(own) and not any(label.isdecimal() for label in own):
        return ids
    unnamed = [label.casefold() for label in own] == [f"label_{output}" for output in range(len(own))]
    return list(range(len(own))) if unnamed and len(own) == len(wanted) else None


def _listed(labels: Sequence[str]) -> str:
    more = f", … ({len(labels)} in all)" if len(labels) > _SHOWN else ""
    return ", ".join(labels[:_SHOWN]) + more
