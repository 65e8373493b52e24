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


@dataclasses.dataclass(frozen=True)
class Table:
    """The names of one architecture.

    Attributes:
      prefix: stands before encoder names in a model with a head; may be missing in files.
      encoder: (name, path, transpose) rows; transformers keeps linear kernels as [out, in], we as [in, out].
      head: the same for the masked-LM head, without prefix.
      tied: (name, path) of weights that files may hold a second time; equal to the parameter at the path.
      ignored: patterns of names that are expected and not read.
    """

    prefix: str
    encoder: tuple[tuple[str, str, bool], ...]
    head: tuple[tuple[str, str, bool], ...]
    tied: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...]

    def rows(self, *, head: bool) -> tuple[tuple[str, str, bool], ...]:
        """The encoder's rows under their prefix, then the head's, with paths as `MaskedLM` has them."""
        encoder = tuple((self.prefix + name, f"encoder/{path}", turn) for name, path, turn in self.encoder)
        return (
            encoder + tuple((name, f"head/{path}", turn) for name, path, turn in self.head)
            if head
            else encoder
        )


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
    head=(
        *_linear("cls.predictions.transform.dense", "transform"),
        *_norm("cls.predictions.transform.LayerNorm", "norm"),
        ("cls.predictions.bias", "bias", False),
    ),
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
    head=(
        *_linear("vocab_transform", "transform"),
        *_norm("vocab_layer_norm", "norm"),
        ("vocab_projector.bias", "bias", False),
    ),
    tied=(("vocab_projector.weight", "encoder/embeddings/word/embedding"),),
    ignored=(r"(distilbert\.)?embeddings\.position_ids",),
)

TABLES = {"bert": BERT, "distilbert": DISTILBERT}

# Checkpoints converted from TensorFlow in transformers' first year.
OLD_SPELLINGS = ((re.compile(r"\.gamma$"), ".weight"), (re.compile(r"\.beta$"), ".bias"))


def path_of(table: Table, name: str) -> tuple[str, bool] | None:
    """The `MaskedLM` path of a Hugging Face name and whether its array is transposed; None if unknown."""
    for pattern, path, transpose in _readers(table):
        if match := pattern.fullmatch(name):
            return path.format(**match.groupdict()), transpose
    return None


def name_of(table: Table, path: str) -> tuple[str, bool]:
    """The Hugging Face name, with prefix, of a `MaskedLM` path and whether its array is transposed.

    Raises:
      KeyError: no such row.
    """
    for pattern, name, transpose in _writers(table):
        if match := pattern.fullmatch(path):
            return name.format(**match.groupdict()), transpose
    raise KeyError(path)


def has_head(table: Table, names: Mapping[str, Any]) -> bool:
    """Whether any weight of a masked-LM head is among `names`."""
    head = {path for _, path, _ in table.rows(head=True) if path.startswith("head/")}
    return any((found := path_of(table, _modern(name))) is not None and found[0] in head for name in names)


def has_pooler(table: Table, names: Mapping[str, Any]) -> bool:
    """Whether the weights of a pooler are among `names`."""
    return any(path_of(table, _modern(name)) == ("encoder/pooler/kernel", True) for name in names)


def to_params(
    table: Table,
    weights: Mapping[str, np.ndarray],
    shapes: Params,
    where: str,
    *,
    head: bool,
    tied: bool = True,
) -> Params:
    """Float32 parameters out of Hugging Face weights.

    Args:
      table: of the weights' architecture.
      weights: name → array, float of any width.
      shapes: what `MaskedLM` needs (or `{"encoder": …}` of it): nested dicts of things with a shape.
      where: the file or directory, for messages.
      head: whether the masked-LM head is read; if not, its weights are expected and ignored.
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
            if head:
                copies[name] = _checked(array, wanted[tied_paths[name]], original, where)
            continue
        if any(re.fullmatch(pattern, name) for pattern in table.ignored):
            continue
        row = path_of(table, name)
        if row is None:
            raise UserError(
                f"{where} holds an unknown weight {original!r}; expected those of {_kind(table, head)}"
            )
        path, transpose = row
        if path not in wanted:
            if path.startswith("encoder/pooler/") or (path.startswith("head/") and not head):
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
                f"{where} lacks the weight {name_of(table, path)[0]!r}; its config.json asks for it"
            )
    if head:
        _check_tied(table, copies, found, where, tied)
    return traverse_util.unflatten_dict({tuple(path.split("/")): found[path] for path in wanted})


def from_params(table: Table, params: Params, *, prefix: bool) -> dict[str, np.ndarray]:
    """Hugging Face weights out of `MaskedLM` parameters (or `{"encoder": …}` of them), in the table's order.

    Args:
      table: of the architecture to write.
      params: nested dicts of arrays; written as float32.
      prefix: whether encoder names carry the architecture's prefix, as in a model with a head.
    """
    weights = {}
    for path, array in traverse_util.flatten_dict(params, sep="/").items():
        name, transpose = name_of(table, path)
        array = np.asarray(array, np.float32)
        weights[name if prefix else name.removeprefix(table.prefix)] = np.ascontiguousarray(
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


def _kind(table: Table, head: bool) -> str:
    architecture = {"bert.": "BERT", "distilbert.": "DistilBERT"}[table.prefix]
    return f"a {architecture} masked language model" if head else f"a {architecture} encoder"


@functools.cache
def _readers(table: Table) -> tuple[tuple[re.Pattern[str], str, bool], ...]:
    return tuple(_reader(table, *row) for row in table.rows(head=True))


def _reader(table: Table, name: str, path: str, transpose: bool) -> tuple[re.Pattern[str], str, bool]:
    if name.startswith(table.prefix):
        return (
            re.compile(f"(?:{re.escape(table.prefix)})?" + _pattern(name.removeprefix(table.prefix))),
            path,
            transpose,
        )
    return re.compile(_pattern(name)), path, transpose


@functools.cache
def _writers(table: Table) -> tuple[tuple[re.Pattern[str], str, bool], ...]:
    return tuple((re.compile(_pattern(path)), name, turn) for name, path, turn in table.rows(head=True))


def _pattern(template: str) -> str:
    # Layer numbers have no leading zeros, so names and paths are one to one.
    before, *after = (re.escape(part) for part in template.split("{n}"))
    return before + "".join(rf"(?P<n>0|[1-9]\d*){part}" for part in after)
