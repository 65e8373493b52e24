"""The losses of fine-tuning against PyTorch, and their independence of how a batch is split and padded."""

import jax
import numpy as np
import pytest

from distiljax.nn import EncoderConfig, HeadConfig, TaskModel
from distiljax.tasks.objective import FineTuning, TaskLoss

torch = pytest.importorskip("torch")
F = torch.nn.functional

LABELS = ("a", "b", "c")
HEADS = {
    "sequences": HeadConfig("sequence_classification", LABELS),
    "regression": HeadConfig("sequence_classification", ("score",), regression=True),
    "tokens": HeadConfig("token_classification", LABELS),
    "answers": HeadConfig("question_answering"),
}
T = 1.7


def make(name, soft=0.5):
    config = EncoderConfig(
        vocab_size=40, hidden_size=12, num_layers=1, num_heads=2, intermediate_size=16, max_positions=16
    )
    head = HEADS[name]
    model = TaskModel(head.encoder_config(config), head)
    return FineTuning(model, model, TaskLoss(1.0, soft, T))


def batch(name, rows=6, length=16, seed=0):
    """Rows of several lengths, the last one a filler."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, length + 1, rows)
    lengths[-1] = 0
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    labels = {
        "sequences": lambda: np.where(lengths > 0, rng.integers(0, 3, rows), -100).astype(np.int32),
        "regression": lambda: rng.normal(size=rows).astype(np.float32),
        "tokens": lambda: np.where(
            (mask > 0) & (rng.random(mask.shape) < 0.6), rng.integers(0, 3, mask.shape), -100
        ).astype(np.int32),
        "answers": lambda: (rng.random((rows, 2)) * lengths[:, None]).astype(np.int32),
    }[name]()
    return {
        "input_ids": rng.integers(1, 40, mask.shape).astype(np.int32) * mask,
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(mask),
        "row": np.where(lengths > 0, np.arange(rows), -1).astype(np.int32),
        "labels": labels,
    }


def logits_for(name, rows, seed):
    rng = np.random.default_rng(seed)
    size = HEADS[name].num_outputs
    shape = (
        rows["attention_mask"].shape + (size,) if name in ("tokens", "answers") else (len(rows["row"]), size)
    )
    return (3 * rng.normal(size=shape)).astype(np.float32)


def soft(student, teacher):
    """T² · KL of each distribution, as the original script writes it."""
    losses = F.kl_div(F.log_softmax(student / T, -1), F.softmax(teacher / T, -1), reduction="none")
    return T**2 * losses.sum(-1)


def expected(name, rows, student, teacher):
    """(label loss, soft loss) in PyTorch, row by row without padding."""
    student, teacher = torch.from_numpy(student).double(), torch.from_numpy(teacher).double()
    labels = torch.from_numpy(rows["labels"])
    real = rows["row"] >= 0
    if name == "regression":
        kept = student[real][:, 0], teacher[real][:, 0]
        return F.mse_loss(kept[0], labels[real].double()), F.mse_loss(*kept)
    if name == "sequences":
        return F.cross_entropy(student[real], labels[real].long()), soft(student[real], teacher[real]).mean()
    lengths = rows["attention_mask"].sum(1)
    if name == "tokens":
        flat = torch.from_numpy(rows["attention_mask"] > 0)
        label = F.cross_entropy(student[flat], labels[flat].long(), ignore_index=-100)
        return label, soft(student[flat], teacher[flat]).mean()
    label, softly = [], []
    for row in np.flatnonzero(real):
        for end in (0, 1):
            mine, other = student[row, : lengths[row], end], teacher[row, : lengths[row], end]
            label.append(F.cross_entropy(mine[None], labels[row, end][None].long()))
            softly.append(soft(mine, other))
    return torch.stack(label).mean(), torch.stack(softly).mean()


@pytest.mark.parametrize("name", HEADS)
def test_the_losses_are_pytorchs(name):
    objective, rows = make(name), batch(name)
    student, teacher = logits_for(name, rows, 1), logits_for(name, rows, 2)
    terms = objective.label_terms(student, rows) | objective.soft_terms(student, teacher, rows)
    for term, loss in zip(("label", "soft"), expected(name, rows, student, teacher), strict=True):
        assert float(terms[term].sum / terms[term].count) == pytest.approx(float(loss), rel=1e-5)
    counts = objective.counts(rows)
    assert {key: float(counts[key]) for key in counts} == {
        key: pytest.approx(float(terms[key].count)) for key in ("label", "soft")
    }


@pytest.mark.parametrize("name", HEADS)
def test_padding_and_fillers_reach_neither_loss_nor_gradient(name):
    objective = make(name)
    rows = batch(name)
    params = jax.jit(objective.model.init)(jax.random.key(0), rows["input_ids"])["params"]
    teacher = jax.tree.map(lambda x: x + 0.1, params)

    def loss(params, rows):
        counts = objective.counts(rows)
        scales = {key: weight / counts[key] for key, weight in objective.weighted().items()}
        return objective.loss_and_terms(params, {"teacher": teacher}, rows, None, scales)[0]

    run = jax.jit(jax.value_and_grad(loss))
    value, gradient = run(params, rows)
    assert np.isfinite(value) and all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    wild = {**rows, "input_ids": np.where(rows["attention_mask"] > 0, rows["input_ids"], 33)}
    if name in ("regression", "sequences"):
        wild["labels"] = rows["labels"].copy()
        wild["labels"][-1] = 2
    changed, again = run(params, wild)
    assert changed == pytest.approx(float(value), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, again)


@pytest.mark.parametrize("name", HEADS)
def test_a_filler_may_as_well_not_be_there(name):
    objective, rows = make(name), batch(name)
    student, teacher = logits_for(name, rows, 1), logits_for(name, rows, 2)

    def terms(count):
        some = {key: x[:count] for key, x in rows.items()}
        return objective.label_terms(student[:count], some) | objective.soft_terms(
            student[:count], teacher[:count], some
        )

    for key, term in terms(6).items():
        other = terms(5)[key]
        assert (float(term.sum), float(term.count)) == pytest.approx((float(other.sum), float(other.count)))


def test_logits_from_the_cache_are_the_teachers():
    objective, rows = make("answers"), batch("answers")
    params = jax.jit(objective.model.init)(jax.random.key(0), rows["input_ids"])["params"]
    teacher = jax.tree.map(lambda x: x + 0.1, params)
    _, live = objective.loss_and_terms(params, {"teacher": teacher}, rows, None, {"soft": 1.0})
    logits = objective.model.apply(
        {"params": teacher}, *(rows[key] for key in ("input_ids", "attention_mask", "token_type_ids"))
    )
    rows = {**rows, "teacher_logits": np.asarray(logits)}
    _, cached = objective.loss_and_terms(params, {"teacher": None}, rows, None, {"soft": 1.0})
    assert float(live["soft"].sum) == pytest.approx(float(cached["soft"].sum), rel=1e-6)
    assert float(live["soft"].sum) > 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"label": 0.0}, "label 0.0, soft 0.0"),
        ({"label": -1.0}, "label -1.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_bad_weights(fields, words):
    with pytest.raises(ValueError, match=words):
        TaskLoss(**fields)
