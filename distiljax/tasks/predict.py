"""Labels, entities, answers or words for [MASK]: what a model says of texts, whichever head it has."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distiljax.errors import UserError
from distiljax.hub import Model, check_vocabulary
from distiljax.hub.heads import MASKED_LM
from distiljax.nn import MaskedLM, TaskModel
from distiljax.nn.heads import ANSWERS, SEQUENCES, TOKENS
from distiljax.nn.linear import place_compute_params
from distiljax.tasks.features import SHORTEST, Features, Pieces, make_features, ragged
from distiljax.tasks.fill_mask import fill_mask
from distiljax.tasks.inputs import as_input, split_words
from distiljax.tasks.metrics import entities
from distiljax.tasks.spans import N_BEST, Span, best_spans
from distiljax.tasks.stream import Item, Output, stream

log = logging.getLogger(__name__)

STRIDE = 128
OUTSIDE = "O"


def predict(
    module: Model,
    params: Any,
    tokenizer: Any,
    inputs: Iterable[str | Mapping[str, Any]],
    *,
    batch_size: int = 32,
    top_k: int | None = None,
    max_length: int = 0,
    stride: int = STRIDE,
    no_answer: float | None = None,
) -> Iterator[dict[str, Any]]:
    """What a model says of each input, in their order, in constant memory; see `stream` for how.

    An input is a text or an object; an "id" in it comes back in its result, as do its fields but for a context.

    - Sequence classification: `{"text"}` or `{"text", "text_pair"}` → `"labels": [{"label", "score"}, … top_k]`, the
      score being the softmax probability; of a regression `"score"`. Texts are cut at `max_length`.
    - Token classification: `{"text"}` or `{"tokens"}` → `"entities": [{"label", "text", "score", "start", "end"}, …]`,
      the score being the mean probability of the words' labels, start and end (excluded) characters of the text. A
      text is split into words by `split_words`. For `tokens` the text is that of the tokens with single spaces, and
      there are `"labels"` too, one a token.
    - Question answering: `{"question", "context"}` → `"answers": [{"text", "score", "start", "end"}, … top_k]`, start
      and end characters of the context; the scores are those of `best_spans`. The text "" says that there is no answer.
    - Masked language model: see `fill_mask`.

    Args:
      module, params: of `from_pretrained(…, head="any")`.
      tokenizer: its tokenizer.
      inputs: texts or objects, iterated over in a thread.
      batch_size: rows at once, at most.
      top_k: how many labels, answers or words; by default 5 words, 1 of the others.
      max_length: tokens in a row; by default the model's positions.
      stride: tokens that two windows of a long text share (entities, answers).
      no_answer: a question has none where the logit of no answer is higher than that of the best answer by more than
        this; None: it always has one, unless the context is empty.

    Raises:
      UserError: a model without a head, a bad setting, or an input that does not fit, after the results of those
        before it.
    """
    _refuse_unused(module, top_k, max_length, no_answer)
    if isinstance(module, MaskedLM):
        k = 5 if top_k is None else top_k
        yield from fill_mask(module, params, tokenizer, inputs, top_k=k, batch_size=batch_size)
        return
    if not isinstance(module, TaskModel):
        raise UserError(
            "the model has no head; train one with: distiljax finetune --config=… --config.model=…"
        )
    check_vocabulary(tokenizer, module.config, "the model")
    kind, positions = module.head.kind, module.config.max_positions
    length = max_length or positions
    shortest = min(SHORTEST, positions)
    if not shortest <= length <= positions:
        raise UserError(
            f"max_length is {max_length}; expected {shortest} to the model's {positions} positions (0 = all of them)"
        )
    k = 1 if top_k is None else top_k
    most = len(module.head.labels) if kind == SEQUENCES else 1000
    if not 1 <= k <= most:
        raise UserError(f"top_k is {k}; expected 1 to {most}")
    placed = place_compute_params(params, module.dtype)
    model = _Model(module, placed, tokenizer, length, min(stride, length // 4))
    job: Any
    if kind == SEQUENCES:
        job = _Labels(model, k)
    elif kind == TOKENS:
        job = _Entities(model)
    else:
        job = _Answers(model, k, no_answer)
    items = (
        job.read(as_input(item, kind, f"input {number}"), number) for number, item in enumerate(inputs, 1)
    )
    yield from stream(items, job, batch_size=batch_size, limit=length)
    job.close()


def _refuse_unused(module: Model, top_k: int | None, max_length: int, no_answer: float | None) -> None:
    kind = (
        MASKED_LM
        if isinstance(module, MaskedLM)
        else module.head.kind
        if isinstance(module, TaskModel)
        else ""
    )
    for name, value, unused in (
        ("no_answer", no_answer, no_answer is not None and kind != ANSWERS),
        ("top_k", top_k, top_k is not None and kind == TOKENS),
        ("max_length", max_length, max_length != 0 and kind == MASKED_LM),
    ):
        if kind and unused:
            raise UserError(
                f"{name} is {value}, which a model for {kind.replace('_', ' ')} has no use for; leave it out"
            )


class _Model:
    """A task model, and how texts become its rows."""

    def __init__(self, module: TaskModel, params: Any, tokenizer: Any, max_length: int, stride: int) -> None:
        self.module, self._params, self._pieces = module, params, Pieces(tokenizer)
        self.max_length, self._stride = max_length, stride

    def features(self, columns: Mapping[str, list[Any]]) -> Features:
        return make_features(
            self.module.head.kind,
            columns,
            self._pieces,
            max_length=self.max_length,
            stride=self._stride,
            labelled=False,
        )

    def run(self, batch: dict[str, np.ndarray]) -> tuple[jax.Array, ...]:
        return _outputs(
            self.module, self._params, batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]
        )


@functools.partial(jax.jit, static_argnums=0)
def _outputs(
    module: TaskModel, params: Any, ids: jax.Array, attention_mask: jax.Array, token_type_ids: jax.Array
) -> tuple[jax.Array, ...]:
    """What of the logits leaves the device.

    Probabilities [B, L] of sequences, or a number [B, 1]; the best label of each token and its probability [B, S];
    logits [B, S, 2] of answers.
    """
    logits: Any = module.apply({"params": params}, ids, attention_mask, token_type_ids)
    if module.head.kind == ANSWERS or module.head.regression:
        return (logits,)
    scores = jax.nn.softmax(logits)
    if module.head.kind == SEQUENCES:
        return (scores,)
    return jnp.argmax(scores, axis=-1), jnp.max(scores, axis=-1)


class _Job:
    """What the three have in common."""

    def __init__(self, model: _Model) -> None:
        self._model = model
        self._head = model.module.head

    def read(self, given: Item, number: int) -> Item:
        """What `prepare` and `result` need of an input."""
        return given

    def size(self, item: Item) -> int:
        return sum(len(value) for value in item.values() if isinstance(value, str))

    def run(self, batch: dict[str, np.ndarray]) -> tuple[jax.Array, ...]:
        return self._model.run(batch)

    def close(self) -> None:
        """Says what there is to say when all is done."""


class _Labels(_Job):
    def __init__(self, model: _Model, top_k: int) -> None:
        super().__init__(model)
        self._top_k, self._truncated, self._inputs = top_k, 0, 0

    def prepare(self, items: Sequence[Item]) -> Features:
        # A model is not asked about a pair with an empty text where there is no second one.
        paired = np.array(["text_pair" in item for item in items])
        parts: list[Features] = []
        places: list[int] = []
        for fields, group in ((("text", "text_pair"), paired), (("text",), ~paired)):
            numbers = np.flatnonzero(group).tolist()
            if numbers:
                parts.append(self._model.features({f: [items[n][f] for n in numbers] for f in fields}))
                places += numbers
        self._inputs += len(items)
        self._truncated += sum(part.truncated for part in parts)
        return _merged(parts, places)

    def result(self, item: Item, features: Features, rows: Sequence[int], outputs: Sequence[Output]) -> Item:
        ((scores,),) = outputs
        if self._head.regression:
            return {**item, "score": float(scores[0])}
        best = np.argsort(-scores, kind="stable")[: self._top_k]
        labels = [{"label": self._head.labels[i], "score": float(scores[i])} for i in best]
        return {**item, "labels": labels}

    def close(self) -> None:
        if self._truncated:
            log.warning(
                "%s of %s texts are longer than %d tokens; only their beginning was read",
                f"{self._truncated:,}",
                f"{self._inputs:,}",
                self._model.max_length,
            )


class _Entities(_Job):
    def __init__(self, model: _Model) -> None:
        super().__init__(model)
        # Labels without B- and I-, such as parts of speech: neighbours with the same one are one entity.
        self._tags = [
            label if label == OUTSIDE or re.match(r"[BIES]-", label) else f"I-{label}"
            for label in self._head.labels
        ]

    def read(self, given: Item, number: int) -> Item:
        if "tokens" in given:
            ends = list(itertools.accumulate(len(token) + 1 for token in given["tokens"]))
            words = [
                (end - 1 - len(token), end - 1) for token, end in zip(given["tokens"], ends, strict=True)
            ]
            return {"given": given, "text": " ".join(given["tokens"]), "words": words}
        return {"given": given, "text": given["text"], "words": split_words(given["text"])}

    def prepare(self, items: Sequence[Item]) -> Features:
        tokens = [[item["text"][begin:end] for begin, end in item["words"]] for item in items]
        return self._model.features({"tokens": tokens})

    def result(self, item: Item, features: Features, rows: Sequence[int], outputs: Sequence[Output]) -> Item:
        labels, scores = self._words(len(item["words"]), features, rows, outputs)
        found = []
        for kind, first, last in entities([self._tags[label] for label in labels]):
            start, end = item["words"][first][0], item["words"][last][1]
            score = float(np.mean(scores[first : last + 1]))
            found.append(
                {"label": kind, "text": item["text"][start:end], "score": score, "start": start, "end": end}
            )
        result = {**item["given"], "text": item["text"], "entities": found}
        if "tokens" in item["given"]:
            result["labels"] = [self._head.labels[label] for label in labels]
        return result

    def _words(
        self, count: int, features: Features, rows: Sequence[int], outputs: Sequence[Output]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Label id and its probability of each word; a word that the tokenizer drops is outside of any entity."""
        outside = self._head.labels.index(OUTSIDE) if OUTSIDE in self._head.labels else 0
        labels, scores = np.full(count, outside), np.zeros(count, np.float32)
        assert features.words is not None
        for row, (label, score) in zip(rows, outputs, strict=True):
            words = features.words[features.starts[row] : features.starts[row + 1]]
            (scored,) = np.nonzero(words >= 0)
            labels[words[scored]], scores[words[scored]] = label[scored], score[scored]
        return labels, scores


class _Answers(_Job):
    def __init__(self, model: _Model, top_k: int, no_answer: float | None) -> None:
        super().__init__(model)
        self._top_k, self._threshold = top_k, no_answer

    def read(self, given: Item, number: int) -> Item:
        return {"number": number, **given}

    def prepare(self, items: Sequence[Item]) -> Features:
        columns = {field: [item[field] for item in items] for field in ("question", "context")}
        return self._model.features({**columns, "id": [item.get("id", item["number"]) for item in items]})

    def result(self, item: Item, features: Features, rows: Sequence[int], outputs: Sequence[Output]) -> Item:
        assert features.offsets is not None
        windows = []
        for row, (logits,) in zip(rows, outputs, strict=True):
            offsets = features.offsets[features.starts[row] : features.starts[row + 1]]
            windows.append((logits[: len(offsets)], offsets))
        spans = best_spans(
            item["context"],
            windows,
            n_best=max(N_BEST, self._top_k),
            no_answer=self._threshold is not None,
        )
        answers = [
            {"text": span.text, "score": span.score, "start": span.start, "end": span.end}
            for span in self._chosen(spans)
        ]
        given: Item = {field: item[field] for field in ("id", "question") if field in item}
        return {**given, "answers": answers}

    def _chosen(self, spans: list[Span]) -> list[Span]:
        """The best, no answer first if it is better by more than the threshold, and else left out."""
        answers = [span for span in spans if span.end > span.start]
        none = [span for span in spans if span.end == span.start]
        if none and answers and self._threshold is not None:
            # Scores are a softmax of the logits, so that their logarithms differ as these do.
            margin = _log(none[0].score) - _log(answers[0].score)
            none = none if margin > self._threshold else []
        return [*none, *answers][: self._top_k]


def _log(score: float) -> float:
    return math.log(score) if score > 0 else -math.inf


def _merged(parts: Sequence[Features], places: Sequence[int]) -> Features:
    """Sequence features as one, in the order of the places that their rows, part after part, are to have."""
    if len(parts) == 1:
        return parts[0]
    order = np.argsort(places)
    lengths = np.concatenate([part.lengths for part in parts])
    begins = np.cumsum(lengths) - lengths
    tokens = np.concatenate([part.tokens for part in parts])
    return Features(
        parts[0].kind,
        tokens[ragged(begins[order], lengths[order])],
        np.concatenate([[0], np.cumsum(lengths[order])]),
        np.concatenate([part.second for part in parts])[order],
        np.arange(len(lengths), dtype=np.int32),
        truncated=sum(part.truncated for part in parts),
        pad_token_id=parts[0].pad_token_id,
    )
