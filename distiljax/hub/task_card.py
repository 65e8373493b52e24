"""The model card (README.md) of a model that was fine-tuned on a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distiljax.hub.card import front_matter, last_part, table, training_time

_PIPELINES = {
    "sequence_classification": ("text-classification", '"What a lovely film."'),
    "token_classification": ("token-classification", '"She lives in Paris."'),
    "question_answering": (
        "question-answering",
        'question="Where does she live?", context="She lives in Paris."',
    ),
}

_USE = """## Use

```python
from transformers import pipeline

directory = "."  # this directory, or its name on the hub
run = pipeline("{pipeline}", model=directory)
print(run({example}))
```"""

_LIMITATIONS = """## Limitations

The model repeats the errors and biases of the data that it was trained on. The figures above are of the data named
there; they do not carry over to other text."""


def task_card(facts: Mapping[str, Any]) -> str:
    """A model card in Markdown with the front matter that the Hugging Face hub reads.

    Args:
      facts: `name`, `language`, `license`, strings; `model`, the run's model.json (`head`, `task`, `source`); `config`
        and `result`, the run's config.json and result.json.
    """
    model, config, result = (facts.get(key) or {} for key in ("model", "config", "result"))
    head = model["head"]
    pipeline, example = _PIPELINES[head["kind"]]
    source, teacher = model.get("source"), config.get("teacher")
    text = f"This model is `{last_part(source)}`, fine-tuned on {model['task']} with distiljax"
    if teacher:
        text += f", also towards the soft targets of `{last_part(teacher)}`"
    if "parameters" in result:
        text += f". It has {result['parameters']:,} parameters"
    sections = [
        front_matter(facts, source, pipeline, ("distillation", "distiljax") if teacher else ("distiljax",)),
        f"# {facts.get('name') or f'{last_part(source)}, fine-tuned on ' + model['task']}",
        text + ".",
        *_results(result),
        *_labels(head),
        "## Training\n\n" + table(("", ""), [row for row in _settings(config, result) if row[1]]),
        _USE.format(pipeline=pipeline, example=example),
        _LIMITATIONS,
    ]
    return "\n\n".join(sections) + "\n"


def _results(result: Mapping[str, Any]) -> Iterator[str]:
    best = result.get("best") or {}
    metrics = [
        (name, value) for name, value in best.items() if name != "step" and not name.startswith("loss")
    ]
    if metrics:
        rows = [(name.replace("_", " "), f"{100 * value:.1f} %") for name, value in sorted(metrics)]
        yield "## Evaluation\n\nOn the validation split.\n\n" + table(("metric", "value"), rows)


def _labels(head: Mapping[str, Any]) -> Iterator[str]:
    if head.get("labels") and not head.get("regression"):
        yield "Labels: " + ", ".join(f"`{label}`" for label in head["labels"]) + "."


def _settings(config: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    data, loss, optimizer = (config.get(key) or {} for key in ("data", "loss", "optimizer"))
    yield "data", last_part(data.get("source") or config.get("task") or "")
    yield "examples", f"{result['examples']:,}" if "examples" in result else ""
    if config.get("teacher"):
        yield (
            "loss",
            f"{loss['label']:g} × labels + {loss['soft']:g} × soft targets (T = {loss['temperature']:g})",
        )
    yield "longest row", f"{data['max_length']} tokens" if "max_length" in data else ""
    yield "batch", f"{config['batch_size']:,} rows" if "batch_size" in config else ""
    yield (
        "optimiser",
        f"AdamW, peak learning rate {optimizer['peak_lr']:g}, linear decay" if optimizer else "",
    )
    yield "compute dtype", str(config.get("dtype") or "")
    yield "steps", f"{result['steps']:,}" if "steps" in result else ""
    yield "time", training_time(result["seconds"]) if "seconds" in result else ""
    yield "seed", str(config.get("seed", ""))
