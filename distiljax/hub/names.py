"""Which Hugging Face weight is which parameter: one table an architecture, read in both directions.

A row's two sides are templates in which `{n}` stands for the layer number. The left side is the name under
the architecture's prefix as transformers writes it; the right side is the path in our parameters.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from distiljax.errors import UserError

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """The names of one architecture.

    Attributes:
      prefix: stands before encoder names in a model with a head; may be missing in files.
      encoder: (name, path, transpose) rows; transformers keeps linear kernels as [out, in], we as [in, out].
      heads: the same for each kind of head, without prefix; paths are relative to the parameters' `head`.
      tied: (name, path) of weights that files may hold a second time; equal to the parameter at the path.
      ignored: patterns of names that are expected and not read.
    """

    prefix: str
    encoder: tuple[tuple[str, str, bool], ...]
    heads: Mapping[str, tuple[tuple[str, str, bool], ...]]
    tied: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...]

    def rows(self, head: str | None) -> tuple[tuple[str, str, bool], ...]:
        """The encoder's rows under their prefix, then those of a kind of head, with paths as models have them."""
        encoder = tuple((self.prefix + name, f"encoder/{path}", turn) for name, path, turn in self.encoder)
        rows = self.heads[head] if head else ()
        return encoder + tuple((name, f"head/{path}", turn) for name, path, turn in rows)


def _linear(name: str, path: str) -> tuple[tuple[str, str, bool], ...]:
    return (f"{name}.weight", f"{path}/kernel", True), (f"{name}.bias", f"{path}/bias", False)


def _norm(name: str, path: str) -> tuple[tuple[str, str, bool], ...]:
    return (f"{name}.weight", f"{path}/scale", False), (f"{name}.bias", f"{path}/bias", False)


BERT = Table(
    prefix="bert.",
    encoder=(
        ("embeddings.word_embeddings.weight", "embeddings/word/embedding", False),
        ("embeddings.position_embeddings.weight", "embeddings/position/embedding", False),
        ("embeddings.token_type_embeddings.weight", "embeddings/token_type/embedding", False),
        *_norm("embeddings.LayerNorm", "embeddings/norm"),
        *_linear("encoder.layer.{n}.attention.self.query", "layer_{n}/attention/query"),
        *_linear("encoder.layer.{n}.attention.self.key", "layer_{n}/attention/key"),
        *_linear("encoder.layer.{n}.attention.self.value", "layer_{n}/attention/value"),
        *_linear("encoder.layer.{n}.attention.output.dense", "layer_{n}/attention/output"),
        *_norm("encoder.layer.{n}.attention.output.LayerNorm", "layer_{n}/attention_norm"),
        *_linear("encoder.layer.{n}.intermediate.dense", "layer_{n}/ffn/up"),
        *_linear("encoder.layer.{n}.output.dense", "layer_{n}/ffn/down"),
        *_norm("encoder.layer.{n}.output.LayerNorm", "layer_{n}/ffn_norm"),
        *_linear("pooler.dense", "pooler"),
    ),
    heads={
        "masked_lm": (
            *_linear("cls.predictions.transform.dense", "transform"),
            *_norm("cls.predictions.transform.LayerNorm", "norm"),
            ("cls.predictions.bias", "bias", False),
        ),
        "sequence_classification": _linear("classifier", "classifier"),
        "token_classification": _linear("classifier", "classifier"),
        "question_answering": _linear("qa_outputs", "classifier"),
    },
    tied=(
        ("cls.predictions.decoder.weight", "encoder/embeddings/word/embedding"),
        ("cls.predictions.decoder.bias", "head/bias"),
    ),
    ignored=(
        r"(bert\.)?embeddings\.position_ids",
        r"cls\.seq_relationship\.(weight|bias)",
    ),
)

DISTILBERT = Table(
    prefix="distilbert.",
    encoder=(
        ("embeddings.word_embeddings.weight", "embeddings/word/embedding", False),
        ("embeddings.position_embeddings.weight", "embeddings/position/embedding", False),
        *_norm("embeddings.LayerNorm", "embeddings/norm"),
        *_linear("transformer.layer.{n}.attention.q_lin", "layer_{n}/attention/query"),
        *_linear("transformer.layer.{n}.attention.k_lin", "layer_{n}/attention/key"),
        *_linear("transformer.layer.{n}.attention.v_lin", "layer_{n}/attention/value"),
        *_linear("transformer.layer.{n}.attention.out_lin", "layer_{n}/attention/output"),
        *_norm("transformer.layer.{n}.sa_layer_norm", "layer_{n}/attention_norm"),
        *_linear("transformer.layer.{n}.ffn.lin1", "layer_{n}/ffn/up"),
        *_linear("transformer.layer.{n}.ffn.lin2", "layer_{n}/ffn/down"),
        *_norm("transformer.layer.{n}.output_layer_norm", "layer_{n}/ffn_norm"),
    ),
    heads={
        "masked_lm": (
            *_linear("vocab_transform", "transform"),
            *_norm("vocab_layer_norm", "norm"),
            ("vocab_projector.bias", "bias", False),
        ),
        "sequence_classification": (
            *_linear("pre_classifier", "transform"),
            *_linear("classifier", "classifier"),
        ),
        "token_classification": _linear("classifier", "classifier"),
        "question_answering": _linear("qa_outputs", "classifier"),
    },
    tied=(("vocab_projector.weight", "encoder/embeddings/word/embedding"),),
    ignored=(r"(distilbert\.)?embeddings\.position_ids",),
)

TABLES = {"bert": BERT, "distilbert": DISTILBERT}

# Checkpoints converted from TensorFlow in transformers' first year.
OLD_SPELLINGS = ((re.compile(r"\.gamma$"), ".weight"), (re.compile(r"\.beta$"), ".bias"))


def path_of(table: Table, name: str, head: str | None = "masked_lm") -> tuple[str, bool] | None:
    """The path of a Hugging Face name in a model with that head, whether to transpose its array; None if unknown."""
    for pattern, path, transpose in _readers(table, head):
        if match := pattern.fullmatch(name):
            return path.format(**match.groupdict()), transpose
    return None


def name_of(table: Table, path: str, head: str | None = "masked_lm") -> tuple[str, bool]:
    """The Hugging Face name, with prefix, of a path in a model with that head, and whether its array is transposed.

    Raises:
      KeyError: no such row.
    """
    for pattern, name, transpose in _writers(table, head):
        if match := pattern.fullmatch(path):
            return name.format(**match.groupdict()), transpose
    raise KeyError(path)


def stored_heads(table: Table, names: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds of head of which any weight is among `names`.

    A classifier may be one of sequences or of tokens: only the config.json beside it says which.
    """
    modern = {_modern(name) for name in names}
    # Half a masked-LM head is a damaged one; a classifier alone is none of DistilBERT's for sequences.
    enough = {"masked_lm": any}
    return tuple(
        kind
        for kind, rows in table.heads.items()
        if enough.get(kind, all)(name in modern for name, _, _ in rows)
    )


def has_pooler(table: Table, names: Mapping[str, Any]) -> bool:
    """Whether the weights of a pooler are among `names`."""
    return any(path_of(table, _modern(name), None) == ("encoder/pooler/kernel", True) for name in names)


def to_params(
    table: Table,
    weights: Mapping[str, np.ndarray],
    shapes: Params,
    where: str,
    *,
    head: str | None,
    tied: bool = True,
) -> Params:
    """Float32 parameters out of Hugging Face weights.

    Args:
      table: of the weights' architecture.
      weights: name → array, float of any width.
      shapes: what the model needs (or `{"encoder": …}` of it): nested dicts of things with a shape.
      where: the file or directory, for messages.
      head: the kind of head that is read, or None; weights of other heads are expected and ignored.
      tied: False if the config says that the decoder is not tied: then its weight has to be there, and equal.

    Raises:
      UserError: an unknown, missing, doubled or misshapen weight, or a decoder that is not the word
        embeddings.
    """
    wanted = {"/".join(path): leaf.shape for path, leaf in traverse_util.flatten_dict(shapes).items()}
    tied_paths = dict(table.tied)
    found: dict[str, np.ndarray] = {}
    copies: dict[str, np.ndarray] = {}
    for original, array in weights.items():
        name = _modern(original)
        if name in tied_paths:
            if head == "masked_lm":
                copies[name] = _checked(array, wanted[tied_paths[name]], original, where)
            continue
        if any(re.fullmatch(pattern, name) for pattern in table.ignored):
            continue
        row = path_of(table, name, head)
        if row is None:
            if any(path_of(table, name, other) for other in table.heads):
                continue
            raise UserError(
                f"{where} holds an unknown weight {original!r}; expected those of {_kind(table, head)}"
            )
        path, transpose = row
        if path not in wanted:
            if path.startswith("encoder/pooler/"):
                continue
            raise UserError(f"{where} holds the weight {original!r}, which its config.json has no place for")
        if path in found:
            raise UserError(
                f"{where} holds {original!r} twice, with and without its prefix or in its old spelling"
            )
        shape = wanted[path]
        array = _checked(array, shape[::-1] if transpose else shape, original, where)
        found[path] = np.ascontiguousarray(array.T) if transpose else array
    # A tied weight that was stored under its other name only.
    for name, path in table.tied:
        if name in copies and path not in found:
            found[path] = copies[name]
    for path in wanted:
        if path not in found:
            raise UserError(
                f"{where} lacks the weight {name_of(table, path, head)[0]!r}; its config.json asks for it"
            )
    if head == "masked_lm":
        _check_tied(table, copies, found, where, tied)
    return traverse_util.unflatten_dict({tuple(path.split("/")): found[path] for path in wanted})


def from_params(table: Table, params: Params, *, head: str | None) -> dict[str, np.ndarray]:
    """Hugging Face weights out of a model's parameters, in the table's order.

    Args:
      table: of the architecture to write.
      params: nested dicts of arrays under `encoder` and (with a head) `head`; written as float32.
      head: the kind of head; with None encoder names do not carry the architecture's prefix.
    """
    weights = {}
    for path, array in traverse_util.flatten_dict(params, sep="/").items():
        name, transpose = name_of(table, path, head)
        array = np.asarray(array, np.float32)
        weights[name if head else name.removeprefix(table.prefix)] = np.ascontiguousarray(
            array.T if transpose else array
        )
    return weights


def _check_tied(
    table: Table, copies: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], where: str, tied: bool
) -> None:
    for name, path in table.tied:
        if name in copies and not np.array_equal(copies[name], found[path]):
            raise UserError(
                f"{where}: {name!r} differs from {name_of(table, path)[0]!r}; expected equal (tied) weights, "
                "as an untied decoder has no place here"
            )
    decoder = table.tied[0][0]
    if not tied and decoder not in copies:
        raise UserError(
            f"{where} lacks the weight {decoder!r}, and its config.json says tie_word_embeddings false; "
            "expected a decoder equal to the word embeddings"
        )


def _checked(array: np.ndarray, shape: tuple[int, ...], name: str, where: str) -> np.ndarray:
    if tuple(array.shape) != tuple(shape):
        raise UserError(
            f"{where}: {name!r} has shape {list(array.shape)}; expected {list(shape)} by its config.json"
        )
    if array.dtype.kind in "biuc" or array.dtype.itemsize < 2:
        raise UserError(f"{where}: {name!r} is {array.dtype}; expected float32, float16 or bfloat16")
    return array.astype(np.float32)


def _modern(name: str) -> str:
    for pattern, replacement in OLD_SPELLINGS:
        name = pattern.sub(replacement, name)
    return name


def _kind(table: Table, head: str | None) -> str:
    architecture = {"bert.": "BERT", "distilbert.": "DistilBERT"}[table.prefix]
    return f"a {architecture} encoder" + (f" with a head for {head.replace('_', ' ')}" if head else "")


@functools.cache
def _readers(table: Table, head: str | None) -> tuple[tuple[re.Pattern[str], str, bool], ...]:
    return tuple(_reader(table, *row) for row in table.rows(head))


def _reader(table: Table, name: str, path: str, transpose: bool) -> tuple[re.Pattern[str], str, bool]:
    if name.startswith(table.prefix):
        return (
            re.compile(f"(?:{re.escape(table.prefix)})?" + _pattern(name.removeprefix(table.prefix))),
            path,
            transpose,
        )
    return re.compile(_pattern(name)), path, transpose


@functools.cache
def _writers(table: Table, head: str | None) -> tuple[tuple[re.Pattern[str], str, bool], ...]:
    return tuple((re.compile(_pattern(path)), name, turn) for name, path, turn in table.rows(head))


def _pattern(template: str) -> str:
    # Layer numbers have no leading zeros, so names and paths are one to one.
    before, *after = (re.escape(part) for part in template.split("{n}"))
    return before + "".join(rf"(?P<n>0|[1-9]\d*){part}" for part in after)
