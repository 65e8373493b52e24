"""The model card (README.md) of a distilled or trained model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LOSS_TERMS = {
    "ce": "soft targets of the teacher",
    "mlm": "masked language modelling",
    "cos": "cosine of the hidden states",
    "mse": "squared error of the logits",
}


def model_card(facts: Mapping[str, Any]) -> str:
    """A model card in Markdown with the front matter that the Hugging Face hub reads.

    Says only what it is told; every fact may be left out. Local paths are reduced to their last part.

    Args:
      facts: `name`, `language`, `license`, `base_model` (hub name), all strings; `config`, the run's config
        (with `teacher` or `model`, `student`, `data`, `loss`, `masking`, `optimizer`, `batch_size`, …);
        `result`, the run's result.json (`steps`, `tokens`, `seconds`, `machine`, …); `evaluation`, as
        `evaluate` returns it.
    """
    config, result = facts.get("config") or {}, facts.get("result") or {}
    teacher = config.get("teacher")
    source = facts.get("base_model") or teacher or config.get("model")
    name = facts.get("name") or ("Distilled model" if teacher else "Masked language model")
    if not facts.get("name") and source:
        name = f"{last_part(source)}, distilled" if teacher else f"{last_part(source)}, trained further"
    sections = [
        front_matter(
            facts, source, "fill-mask", ("distillation", "distiljax") if teacher else ("distiljax",)
        ),
        f"# {name}",
        _summary(source, teacher, config, result),
        *_recipe(config, result),
        *_evaluation(facts.get("evaluation")),
        _USE,
        _LIMITATIONS,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


_USE = """## Use

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

directory = "."  # this directory, or its name on the hub
model = AutoModelForMaskedLM.from_pretrained(directory)
tokenizer = AutoTokenizer.from_pretrained(directory)
fill_mask = pipeline("fill-mask", model=model, tokenizer=tokenizer)
print(fill_mask(f"The capital of France is {tokenizer.mask_token}."))
```

It is meant to be fine-tuned on a task such as classification, tagging or question answering."""

_LIMITATIONS = """## Limitations

The model learnt from the text (and the teacher) named above and repeats their errors and biases; figures on
one corpus do not carry over to other text. It fills in words; it does not check facts and is not made to
write text."""


def front_matter(facts: Mapping[str, Any], source: Any, pipeline: str, tags: Sequence[str]) -> str:
    """The YAML that the hub reads at the head of a card: `language` and `license` of `facts`, and what is given."""
    entries: dict[str, Any] = {
        "language": facts.get("language"),
        "license": facts.get("license"),
        "library_name": "transformers",
        "pipeline_tag": pipeline,
        "base_model": source if source and _is_hub_name(str(source)) else None,
        "tags": tags,
    }
    lines = ["---"]
    for key, value in entries.items():
        if isinstance(value, (list, tuple)):
            lines += [f"{key}:", *(f"- {_scalar(item)}" for item in value)]
        elif value:
            lines.append(f"{key}: {_scalar(value)}")
    return "\n".join([*lines, "---"])


def _summary(source: Any, teacher: Any, config: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    origin = f"`{last_part(source)}`" if source else ""
    if teacher:
        text = f"This model was distilled from {origin} by the DistilBERT recipe"
        text += " ([Sanh et al. 2019](https://arxiv.org/abs/1910.01108))"
    elif origin:
        text = f"This model is {origin}, trained further with the masked-language-model objective"
    else:
        text = "This is a masked language model"
    if data := (config.get("data") or {}).get("source"):
        text += f" on {_sources(data)}"
    text += ", with distiljax." if teacher or source else "."
    if "parameters" in result:
        text += f" It has {result['parameters']:,} parameters"
        if teacher_parameters := result.get("teacher_parameters"):
            share = 100 * (1 - result["parameters"] / teacher_parameters)
            text += f", {share:.0f} % fewer than the teacher's {teacher_parameters:,}"
        text += "."
    return text


def _recipe(config: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[str]:
    rows = [(name, value) for name, value in _settings(config, result) if value]
    if rows:
        yield "## Training"
        yield table(("", ""), rows)


def _settings(config: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    student, data, loss = (config.get(key) or {} for key in ("student", "data", "loss"))
    masking, optimizer = (config.get(key) or {} for key in ("masking", "optimizer"))
    layers = student.get("layers")
    if isinstance(layers, (list, tuple)):
        layers = ", ".join(str(layer) for layer in layers)
    yield (
        "student layers",
        f"{layers} of the teacher's" if layers else "half of the teacher's" if student else "",
    )
    yield (
        "student initialisation",
        {"teacher": "from the teacher's layers"}.get(
            student.get("initialise", ""), student.get("initialise", "")
        ),
    )
    where = {"ce": " (masked positions only)"} if loss.get("ce_positions") == "masked" else {}
    terms = [
        f"{loss[key]:g} × {text}{where.get(key, '')}" for key, text in _LOSS_TERMS.items() if loss.get(key)
    ]
    yield "loss", " + ".join(terms)
    yield "temperature", f"{loss['temperature']:g}" if "temperature" in loss and loss.get("ce") else ""
    yield "tokens predicted", f"{100 * masking['rate']:g} %" if "rate" in masking else ""
    yield "sequence length", f"{data['seq_len']} tokens" if "seq_len" in data else ""
    yield "batch", f"{config['batch_size']:,} rows" if "batch_size" in config else ""
    if "peak_lr" in optimizer:
        warmup = (
            f", warm-up over {100 * optimizer['warmup_fraction']:g} %"
            if "warmup_fraction" in optimizer
            else ""
        )
        yield "optimiser", f"AdamW, peak learning rate {optimizer['peak_lr']:g}{warmup}, linear decay"
    yield "compute dtype", str(config.get("dtype") or "")
    yield "steps", f"{result['steps']:,}" if "steps" in result else ""
    yield "tokens seen", f"{result['tokens']:,}" if "tokens" in result else ""
    yield "time", training_time(result["seconds"]) if "seconds" in result else ""
    yield "machine", str(result.get("machine") or "")


def _evaluation(evaluation: Mapping[str, Any] | None) -> Iterator[str]:
    models = (evaluation or {}).get("models")
    if not evaluation or not models:
        return
    yield "## Evaluation"
    data = evaluation.get("data") or {}
    measured = "Masked-language-model figures"
    if source := data.get("source"):
        measured += f" on {_sources(source.split(', ') if isinstance(source, str) else source)}"
    if data.get("split"):
        measured += f" ({data['split']} split)"
    if data.get("masked_tokens"):
        measured += f", {data['masked_tokens']:,} masked tokens"
    if any("tokens_per_second" in model for model in models):
        measured += "; speed is that of the encoder"
        measured += f" on {evaluation['machine']}" if evaluation.get("machine") else ""
    yield measured + "."
    columns = {
        "parameters": ("parameters", "{:,}"),
        "bytes": ("size (MB)", "{:,.0f}"),
        "mlm_accuracy": ("accuracy (%)", "{:.2f}"),
        "mlm_loss": ("loss (nats)", "{:.3f}"),
        "tokens_per_second": ("tokens/s", "{:,.0f}"),
    }
    scale = {"bytes": 1e-6, "mlm_accuracy": 100}
    present = {key: column for key, column in columns.items() if any(key in model for model in models)}
    rows = [
        (
            last_part(model.get("name", "")),
            *(
                form.format(model[key] * scale.get(key, 1)) if model.get(key) is not None else ""
                for key, (_, form) in present.items()
            ),
        )
        for model in models
    ]
    yield table(("model", *(title for title, _ in present.values())), rows)
    if len(models) > 1 and (kept := _kept(models[0], models[1])):
        yield kept


def _kept(reference: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    if not reference.get("mlm_accuracy") or model.get("mlm_accuracy") is None:
        return ""
    share = 100 * model["mlm_accuracy"] / reference["mlm_accuracy"]
    return f"The {last_part(model['name'])} keeps {share:.1f} % of the {last_part(reference['name'])}'s accuracy."


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table; with more than two columns those of figures are aligned to the right."""

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    align = ("---", *("---:" if len(head) > 2 else "---" for _ in head[1:]))
    return "\n".join([line(head), line(align), *(line(row) for row in rows)])


def _sources(source: Any) -> str:
    names = [source] if isinstance(source, str) else list(source)
    return ", ".join(f"`{name if name.startswith('hf:') else last_part(name)}`" for name in names)


def last_part(name: Any) -> str:
    """A hub name as it is, a path's last part."""
    text = str(name)
    return text if _is_hub_name(text) else os.path.basename(text.rstrip("/")) or text


def _is_hub_name(text: str) -> bool:
    return bool(_HUB_NAME.fullmatch(text)) and not os.path.exists(text)


def training_time(seconds: float) -> str:
    """Seconds, minutes, or hours and minutes."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _scalar(value: Any) -> str:
    """A YAML scalar: plain where that is unambiguous, else quoted as JSON, which YAML reads."""
    text = str(value)
    # no, on, off and the like would be read as true and false.
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9_./-]*", text)
    reserved = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
    return text if plain and text.lower() not in reserved else json.dumps(text, ensure_ascii=False)
