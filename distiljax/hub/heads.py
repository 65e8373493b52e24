"""Heads in and out of Hugging Face directories: which one a model has, its labels, and fresh ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from distiljax.errors import UserError
from distiljax.hub import names
from distiljax.nn import EncoderConfig, HeadConfig
from distiljax.nn.heads import ANSWERS, SEQUENCES, TOKENS, MaskedLMHead, TaskHead

Params = dict[str, Any]

MASKED_LM = "masked_lm"
_CLASSES = {
    MASKED_LM: "ForMaskedLM",
    SEQUENCES: "ForSequenceClassification",
    TOKENS: "ForTokenClassification",
    ANSWERS: "ForQuestionAnswering",
    None: "Model",
}
_PREFIXES = {"bert": "Bert", "distilbert": "DistilBert"}
_WHAT = {
    MASKED_LM: "masked-LM head",
    SEQUENCES: "head for sequence classification",
    TOKENS: "head for token classification",
    ANSWERS: "head for question answering",
}


def architecture(config: EncoderConfig, head: str | None) -> str:
    """The class of transformers that holds a model with this kind of head."""
    return _PREFIXES[config.model_type] + _CLASSES[head]


def auto_class(hf_config: Mapping[str, Any]) -> str:
    """The class of transformers to load a model of this config.json by, such as AutoModelForMaskedLM."""
    (name,) = hf_config["architectures"]
    return (
        "Auto"
        + "Model" * (not str(name).endswith("Model"))
        + str(name).removeprefix("Distil").removeprefix("Bert")
    )


def stored_head(hf_config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> str | None:
    """The kind of head that a model directory holds: the one that its config.json names, or else the first there is."""
    stored = names.stored_heads(names.TABLES[hf_config["model_type"]], weights)
    for named in hf_config.get("architectures") or ():
        for kind in stored:
            if str(named).endswith(_CLASSES[kind]):
                return kind
    return stored[0] if stored else None


def head_from_hf(hf_config: Mapping[str, Any], kind: str, weights: Mapping[str, np.ndarray]) -> HeadConfig:
    """The head that a config.json describes; transformers leaves out labels that are its defaults.

    Raises:
      ValueError: labels that do not fit.
    """
    if hf_config.get("problem_type") == "multi_label_classification":
        raise ValueError("problem_type is multi_label_classification; expected one label a text")
    if kind == ANSWERS:
        return HeadConfig(kind, dropout=_rate(hf_config.get("qa_dropout")))
    # DistilBERT drops before its classifier of tokens at the encoder's rate.
    own = {"distilbert": {SEQUENCES: "seq_classif_dropout"}}.get(hf_config["model_type"])
    key = own.get(kind, "") if own else "classifier_dropout"
    rate = hf_config.get(key)
    outputs = len(weights["classifier.weight"])
    labels = hf_config.get("id2label") or {}
    if not isinstance(labels, Mapping) or sorted(labels, key=int) != [str(i) for i in range(len(labels))]:
        raise ValueError(f"id2label is {labels!r}; expected a name for each of 0 to {outputs - 1}")
    if labels and len(labels) != outputs:
        raise ValueError(f"id2label names {len(labels)} labels, and the classifier has {outputs} outputs")
    ordered = tuple(labels[str(i)] if labels else f"LABEL_{i}" for i in range(outputs))
    # As transformers: one output is a regression, whatever problem_type says or does not.
    return HeadConfig(kind, ordered, kind == SEQUENCES and outputs == 1, _rate(rate))


def head_to_hf(head: HeadConfig, config: EncoderConfig) -> dict[str, Any]:
    """The part of a config.json that describes a head."""
    rate = head.dropout_rate(config)
    distilbert = config.model_type == "distilbert"
    if head.kind == ANSWERS:
        return {"qa_dropout": rate} if distilbert else {}
    described: dict[str, Any] = {
        "id2label": {str(i): label for i, label in enumerate(head.labels)},
        "label2id": {label: i for i, label in enumerate(head.labels)},
    }
    if head.kind == SEQUENCES:
        described["problem_type"] = "regression" if head.regression else "single_label_classification"
        described["seq_classif_dropout" if distilbert else "classifier_dropout"] = rate
    elif not distilbert:
        described["classifier_dropout"] = rate
    return described


def fits(stored: HeadConfig, wanted: HeadConfig) -> bool:
    """Whether a stored head can go on as the wanted one: the same outputs, by the same names if they have any."""
    if (stored.kind, stored.num_outputs, stored.regression) != (
        wanted.kind,
        wanted.num_outputs,
        wanted.regression,
    ):
        return False
    unnamed = all(label == f"LABEL_{i}" for i, label in enumerate(stored.labels))
    return unnamed or wanted.regression or stored.labels == wanted.labels


def missing(where: str, wanted: str, stored: str | None) -> UserError:
    """What to say of a model without the head that is needed."""
    has = f"a {_WHAT[stored]}" if stored else "no head"
    command = "pretrain" if wanted == MASKED_LM else "finetune"
    return UserError(
        f"{where} has no {_WHAT[wanted]} ({has}); train one with: "
        f"distiljax {command} --config=… --config.model={where}"
    )


def fresh_head(config: EncoderConfig, seed: int = 0) -> Params:
    """A masked-LM head before training: kernel drawn from normal(initializer_range), scale 1, biases 0."""
    hidden, table = np.zeros((1, config.hidden_size)), np.zeros((config.vocab_size, config.hidden_size))
    return jax.device_get(jax.jit(MaskedLMHead(config).init)(jax.random.key(seed), hidden, table)["params"])


def fresh_task_head(config: EncoderConfig, head: HeadConfig, seed: int = 0) -> Params:
    """A task's head before training: kernels drawn from normal(initializer_range), biases 0."""
    hidden = np.zeros((1, 1, config.hidden_size), np.float32)
    pooled = hidden[:, 0] if config.pooler else None
    init = jax.jit(TaskHead(config, head).init)
    return jax.device_get(init(jax.random.key(seed), hidden, pooled)["params"])


def fresh_pooler(config: EncoderConfig, seed: int = 0) -> Params:
    """BERT's pooler before training, for models that come without: kernel as `fresh_head`'s, bias 0."""
    size = config.hidden_size
    kernel = config.initializer_range * jax.random.normal(jax.random.key(seed), (size, size))
    return {"kernel": np.asarray(kernel), "bias": np.zeros(size, np.float32)}


def _rate(value: Any) -> float | None:
    return None if value is None else float(value)
