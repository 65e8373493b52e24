"""The model card: valid front matter, the run's facts, and nothing that it was not told."""

import pytest

from distiljax.hub import model_card

EVALUATION = {
    "data": {"source": "docstrings, /srv/private/wiki.txt", "split": "validation", "masked_tokens": 12345},
    "machine": "1 NVIDIA H200, 16 cores",
    "models": [
        {
            "name": "teacher",
            "path": "/srv/private/teacher",
            "parameters": 109514298,
            "bytes": 438057192,
            "mlm_accuracy": 0.5,
            "mlm_loss": 2.5,
            "tokens_per_second": 1000.4,
        },
        {
            "name": "student",
            "path": "",
            "parameters": 66985530,
            "bytes": 267942120,
            "mlm_accuracy": 0.4875,
            "mlm_loss": 2.75,
            "tokens_per_second": 1990.0,
        },
        {"name": "student before distillation", "mlm_accuracy": 0.01, "mlm_loss": 9.0},
    ],
}


def config():
    from distiljax.distill.config import distill_config

    return {"kind": "distill", **distill_config().to_dict()}


RESULT = {
    "kind": "distill",
    "steps": 12000,
    "tokens": 3_000_000_000,
    "seconds": 7384.0,
    "machine": "8 TPU v5e, 224 cores",
    "parameters": 66985530,
    "teacher_parameters": 109514298,
}


def front_matter(card):
    yaml = pytest.importorskip("yaml")
    assert card.startswith("---\n") and card.count("\n---\n") == 1
    return yaml.safe_load(card.split("---\n")[1])


def test_card_of_a_distillation():
    card = model_card({"config": config(), "result": RESULT, "evaluation": EVALUATION, "language": "en"})
    assert front_matter(card) == {
        "language": "en",
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "base_model": "bert-base-uncased",
        "tags": ["distillation", "distiljax"],
    }
    for fact in (
        "distilled from `bert-base-uncased`",
        "on `docstrings`",
        "66,985,530 parameters, 39 % fewer than the teacher's 109,514,298",
        "5 × soft targets of the teacher + 2 × masked language modelling + 1 × cosine of the hidden states",
        "| temperature | 2 |",
        "| student layers | half of the teacher's |",
        "| batch | 4,096 rows |",
        "| time | 2 h 3 min |",
        "| teacher | 109,514,298 | 438 | 50.00 | 2.500 | 1,000 |",
        "| student before distillation |  |  | 1.00 | 9.000 |  |",
        "keeps 97.5 % of the teacher's accuracy",
        "AutoModelForMaskedLM.from_pretrained",
        "## Limitations",
    ):
        assert fact in card, fact
    # Where the files were is nobody's business.
    assert "/srv" not in card


def test_hub_accepts_the_front_matter():
    huggingface_hub = pytest.importorskip("huggingface_hub")
    card = huggingface_hub.ModelCard(
        model_card({"config": config(), "result": RESULT, "license": "apache-2.0"})
    )
    assert card.data.base_model == "bert-base-uncased" and card.data.license == "apache-2.0"
    assert card.data.tags == ["distillation", "distiljax"] and card.data.pipeline_tag == "fill-mask"


def test_card_without_facts_claims_nothing():
    card = model_card({})
    assert set(front_matter(card)) == {"library_name", "pipeline_tag", "tags"}
    for word in ("distilled", "## Training", "## Evaluation", "None", "license", "  |"):
        assert word not in card
    assert model_card({"evaluation": None, "result": None, "config": None}) == card
    assert "## Evaluation" not in model_card({"evaluation": {"models": []}})


def test_local_teacher_is_no_base_model():
    card = model_card({"config": {**config(), "teacher": "/home/someone/runs/teacher/"}})
    assert "base_model" not in front_matter(card)
    assert "`teacher`" in card and "someone" not in card


def test_explicit_facts_win():
    card = model_card(
        {"config": config(), "name": "tiny: a model", "base_model": "user/bert", "language": "no"}
    )
    data = front_matter(card)
    assert data["base_model"] == "user/bert" and data["language"] == "no"
    assert "# tiny: a model\n" in card


def test_card_of_masked_lm_training():
    from distiljax.distill.config import pretrain_config

    card = model_card({"config": {"kind": "pretrain", **pretrain_config().to_dict()}})
    assert "trained further with the masked-language-model objective" in card
    assert front_matter(card)["tags"] == ["distiljax"] and "temperature" not in card


def test_list_of_layers_and_masked_positions():
    changed = config()
    changed["student"]["layers"] = (1, 3)
    changed["loss"]["ce_positions"] = "masked"
    card = model_card({"config": changed})
    assert "| student layers | 1, 3 of the teacher's |" in card
    assert "5 × soft targets of the teacher (masked positions only)" in card
