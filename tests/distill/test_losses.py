"""Each loss term against its formula in PyTorch, on the same logits and hidden states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distiljax.distill.losses import agreement, cosine_loss, logit_mse_loss, masked_lm_loss, soft_target_loss

torch = pytest.importorskip("torch")
F = torch.nn.functional

B, S, V, E = 3, 7, 101, 16


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return {
        "student": rng.normal(size=(B, S, V)).astype(np.float32) * 3,
        "teacher": rng.normal(size=(B, S, V)).astype(np.float32) * 3,
        "student_hidden": rng.normal(size=(B, S, E)).astype(np.float32),
        "teacher_hidden": rng.normal(size=(B, S, E)).astype(np.float32),
        "labels": rng.integers(0, V, (B, S)).astype(np.int32),
        "weights": (rng.random((B, S)) < 0.6).astype(np.float32),
    }


def value_and_grad(loss, x):
    def mean(x):
        term = loss(x)
        return term.sum / term.count

    return jax.value_and_grad(mean)(jnp.asarray(x))


def compare(ours, torch_loss, leaf):
    torch_loss.backward()
    value, gradient = ours
    assert abs(float(value) - torch_loss.item()) <= 1e-5 * max(1.0, abs(torch_loss.item()))
    expected = leaf.grad.numpy()
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def leaf(x):
    return torch.tensor(x, requires_grad=True)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_soft_target_loss_is_kl_div_batchmean_times_t_squared(data, temperature):
    student, keep = leaf(data["student"]), torch.tensor(data["weights"]) > 0
    expected = (
        F.kl_div(
            F.log_softmax(student[keep] / temperature, -1),
            F.softmax(torch.tensor(data["teacher"])[keep] / temperature, -1),
            reduction="batchmean",
        )
        * temperature**2
    )
    ours = value_and_grad(
        lambda s: soft_target_loss(s, data["teacher"], data["weights"], temperature), data["student"]
    )
    compare(ours, expected, student)


def test_masked_lm_loss_is_cross_entropy_with_ignore_index(data):
    student = leaf(data["student"])
    labels = torch.tensor(np.where(data["weights"] > 0, data["labels"], -100)).long()
    expected = F.cross_entropy(student.view(-1, V), labels.view(-1), ignore_index=-100)
    ours = value_and_grad(lambda s: masked_lm_loss(s, data["labels"], data["weights"]), data["student"])
    compare(ours, expected, student)


def test_cosine_loss_is_cosine_embedding_loss(data):
    hidden, keep = leaf(data["student_hidden"]), torch.tensor(data["weights"]) > 0
    expected = F.cosine_embedding_loss(
        hidden[keep], torch.tensor(data["teacher_hidden"])[keep], torch.ones(int(keep.sum()))
    )
    ours = value_and_grad(
        lambda h: cosine_loss(h, data["teacher_hidden"], data["weights"]), data["student_hidden"]
    )
    compare(ours, expected, hidden)


def test_logit_mse_loss_is_squaresover_positions(data):
    student, keep = leaf(data["student"]), torch.tensor(data["weights"]) > 0
    expected = F.mse_loss(student[keep], torch.tensor(data["teacher"])[keep], reduction="sum") / keep.sum()
    ours = value_and_grad(lambda s: logit_mse_loss(s, data["teacher"], data["weights"]), data["student"])
    compare(ours, expected, student)


def losses(data):
    return {
        "ce": lambda s, h, t, th, w: soft_target_loss(s, t, w, 2.0),
        "mse": lambda s, h, t, th, w: logit_mse_loss(s, t, w),
        "mlm": lambda s, h, t, th, w: masked_lm_loss(s, data["labels"][: len(s)], w),
        "cos": lambda s, h, t, th, w: cosine_loss(h, th, w),
    }


@pytest.mark.parametrize("name", ["ce", "mse", "mlm", "cos"])
def test_masked_loss_equals_sliced_loss(data, name):
    names = ("student", "student_hidden", "teacher", "teacher_hidden")
    weights = np.zeros((B, S), np.float32)
    weights[:2] = 1
    masked = losses(data)[name](*(data[n] for n in names), weights)
    sliced = losses(data)[name](*(data[n][:2] for n in names), weights[:2])
    assert masked.count == sliced.count == 2 * S
    np.testing.assert_allclose(masked.sum, sliced.sum, rtol=1e-6)


@pytest.mark.parametrize("name", ["ce", "mse", "mlm", "cos"])
def test_what_stands_at_unused_positions_cannot_reach_loss_or_gradient(data, name):
    weights = np.zeros((B, S), np.float32)
    weights[0] = 1
    poisoned = {**data, "student": data["student"].copy(), "student_hidden": data["student_hidden"].copy()}
    poisoned["student"][1:] = 1e30
    poisoned["student_hidden"][1:] = 0.0

    def total(student, hidden):
        return losses(data)[name](student, hidden, data["teacher"], data["teacher_hidden"], weights).sum

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(
        jnp.asarray(poisoned["student"]), jnp.asarray(poisoned["student_hidden"])
    )
    assert np.isfinite(value)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert not np.asarray(gradient)[1:].any()


def test_agreement_counts_the_most_likely_tokens(data):
    targets = data["student"].argmax(-1)
    targets[0, 0] = (targets[0, 0] + 1) % V
    term = agreement(jnp.asarray(data["student"]), targets, jnp.ones((B, S)))
    assert (float(term.sum), float(term.count)) == (B * S - 1, B * S)
