"""The train step: one update whatever the devices, the wrapping and the micro-batches; parity with PyTorch."""

import pathlib
import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from distiljax.distill.masking import MaskedRows, Masking, mask_tokens, masking_weights
from distiljax.distill.step import (
    PROJECTION,
    Distillation,
    Models,
    Recipe,
    distillation_loss,
    example_keys,
    make_eval_step,
    make_train_step,
    split_keys,
    term_means,
)
from distiljax.distill.student import student_of
from distiljax.nn import EncoderConfig, MaskedLM
from distiljax.train.optimizer import decayed, make_optimizer
from distiljax.train.parallel import Parallel
from distiljax.train.state import TrainState
from tests import compiling

V, S, B = 96, 16, 16
TEACHER = EncoderConfig(
    vocab_size=V, hidden_size=16, num_layers=4, num_heads=2, intermediate_size=32, max_positions=S
)
SPECIAL = (0, 1, 2, 3, 4)
WEIGHTS = masking_weights(np.arange(V), SPECIAL, 0.7)
MASKING = Masking(mask_token_id=4, vocab_size=V)
PACKING = str(pathlib.Path(__file__).parents[2] / "scripts" / "benchmark_packing.py")


@pytest.fixture(scope="module", autouse=True)
def compiled_in_haste():
    with compiling.in_haste():
        yield


@pytest.fixture(scope="module")
def models():
    teacher = MaskedLM(TEACHER)
    params = jax.device_get(teacher.init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"])
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    # Far enough from zero for every gradient to be well above rounding.
    params = jax.tree.map(lambda x: np.asarray(x + 0.1 * jax.random.normal(next(keys), x.shape)), params)
    return teacher, params


def batch(step, rows=B):
    rng = np.random.default_rng(step)
    ids = rng.integers(5, V, (rows, S)).astype(np.int32)
    segments = np.ones((rows, S), np.int32)
    positions = np.tile(np.arange(S, dtype=np.int32), (rows, 1))
    for b in range(rows):
        cut, end = int(rng.integers(4, 9)), int(rng.integers(10, S + 1))
        segments[b, cut:end], segments[b, end:] = 2, 0
        positions[b, cut:] -= cut
        ids[b, [0, cut]], ids[b, [cut - 1, end - 1]], ids[b, end:] = 2, 3, 0
    return {"input_ids": ids, "segment_ids": segments, "positions": np.where(segments > 0, positions, 0)}


def optimizer_config():
    from distiljax.distill.config import distill_config

    return distill_config().optimizer


def train(
    models,
    mode="jit",
    devices=1,
    micro_batches=1,
    steps=3,
    recipe=None,
    peak_lr=None,
    rows=batch,
    model=1,
    frozen_teacher=None,
    **student,
):
    teacher, teacher_params = models
    recipe = recipe or Recipe(mse=0.01)
    module, params = student_of(teacher, teacher_params, **student)
    config = optimizer_config()
    config.peak_lr = peak_lr or config.peak_lr
    optimizer, schedule = make_optimizer(config, 20)
    parallel = Parallel(mode, jax.devices()[:devices], model)
    step = parallel.wrap(
        make_train_step(
            Distillation(Models(module, teacher), recipe, MASKING),
            optimizer,
            schedule,
            micro_batches=micro_batches,
        ),
        donate=True,
    )
    frozen = {
        "teacher": parallel.place_teacher(frozen_teacher or teacher_params),
        "masking_weights": parallel.replicate(WEIGHTS),
        "seed": parallel.replicate(np.uint32(0)),
    }
    state = parallel.replicate(jax.device_get(TrainState.create(params, optimizer)))
    for t in range(steps):
        placed = parallel.shard(rows(t))
        with jax.transfer_guard("disallow"):
            state, metrics = step(state, frozen, placed)
    return jax.device_get(parallel.unreplicate((state, metrics)))


@pytest.fixture(scope="module")
def reference(models):
    return train(models)


@pytest.mark.parametrize(
    ("mode", "devices", "micro_batches", "model"),
    [
        ("jit", 8, 1, 1),
        ("pmap", 8, 1, 1),
        ("jit", 1, 2, 1),
        ("jit", 1, 8, 1),
        ("jit", 2, 8, 1),
        ("pmap", 4, 2, 1),
        ("jit", 8, 2, 2),
        ("jit", 4, 1, 4),
    ],
)
def test_the_update_does_not_depend_on_devices_wrapping_or_micro_batches(
    models, reference, mode, devices, micro_batches, model
):
    state, metrics = train(models, mode, devices, micro_batches, model=model)
    expected_state, expected_metrics = reference
    assert int(state.step) == 3
    for ours, expected in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(expected_state.params), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


def test_a_spread_teacher_lies_in_parts_on_its_devices(models):
    teacher, teacher_params = models
    parallel = Parallel("jit", jax.devices()[:4], model=4)
    placed = parallel.place_teacher(teacher_params)
    layer = placed["encoder"]["layer_0"]
    shapes = {
        "query": layer["attention"]["query"]["kernel"],
        "output": layer["attention"]["output"]["kernel"],
        "up": layer["ffn"]["up"]["kernel"],
        "down": layer["ffn"]["down"]["kernel"],
        "word": placed["encoder"]["embeddings"]["word"]["embedding"],
        "norm": layer["ffn_norm"]["scale"],
    }
    assert {name: x.addressable_shards[0].data.shape for name, x in shapes.items()} == {
        "query": (16, 4),
        "output": (4, 16),
        "up": (16, 8),
        "down": (8, 16),
        "word": (24, 16),
        "norm": (16,),
    }
    held = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(placed))
    assert held < 0.5 * sum(x.size for x in jax.tree.leaves(teacher_params))
    # No device gathers the teacher's kernels for the step: what it computes with them is spread, too.
    module, params = student_of(teacher, teacher_params)
    optimizer, schedule = make_optimizer(optimizer_config(), 20)
    step = parallel.wrap(
        make_train_step(
            Distillation(Models(module, teacher), Recipe(), MASKING),
            optimizer,
            schedule,
            micro_batches=1,
        )
    )
    state = parallel.replicate(jax.device_get(TrainState.create(params, optimizer)))
    frozen = {
        "teacher": placed,
        "masking_weights": parallel.replicate(WEIGHTS),
        "seed": parallel.replicate(np.uint32(0)),
    }
    for t in range(2):  # the state stays whole on every device, and so the program the same
        state, _ = step(state, frozen, parallel.shard(batch(t)))
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
    assert step._cache_size() == 1
    program = step.lower(state, frozen, parallel.shard(batch(0))).compile().as_text()
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", program)
    # (The student's word embeddings are: the compiler spreads their gradient.)
    assert not {"16,16", "16,32", "32,16"} & set(gathered), gathered


def test_a_step_that_is_not_finite_changes_nothing_but_its_number(models):
    poisoned = jax.tree.map(np.copy, models[1])
    poisoned["encoder"]["embeddings"]["position"]["embedding"][S - 1] = np.nan

    def rows(t):
        """Only batch 1 has a segment that reaches the last position."""
        given = batch(t)
        long = (np.arange(len(given["input_ids"])) == 3)[:, None] & (t == 1)
        positions = np.where(long, np.arange(S), np.minimum(given["positions"], S - 2))
        return given | {
            "positions": positions.astype(np.int32),
            "segment_ids": np.where(long, 1, given["segment_ids"]),
        }

    states, rates = {}, {}
    for steps in (1, 2, 3):
        state, metrics = train(models, steps=steps, rows=rows, frozen_teacher=poisoned)
        states[steps], rates[steps] = state, float(metrics["learning_rate"])
        assert int(state.step) == steps
        assert metrics["skipped"] == (steps == 2)
        assert np.isfinite(metrics["loss"]) == (steps != 2)
    assert rates[1] < rates[2] == rates[3]  # the third step is the second update
    for name in ("params", "opt_state"):
        before, after, later = (jax.tree.leaves(getattr(states[n], name)) for n in (1, 2, 3))
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)
        assert all(np.isfinite(x).all() for x in later)
        assert any((a != b).any() for a, b in zip(after, later, strict=True))


def test_the_student_learns_from_its_teacher(models):
    # The tokens are random, so there is nothing to learn but what the teacher makes of them.
    one_batch = {"rows": lambda t: batch(0), "peak_lr": 1e-2, "recipe": Recipe(mlm=0.0)}
    first, last = (train(models, steps=n, **one_batch)[1] for n in (1, 20))
    assert last["loss_ce"] < 0.5 * first["loss_ce"]
    assert last["loss_cos"] < 0.7 * first["loss_cos"]


def test_gradients_are_reduced_once_a_step_and_never_inside_the_micro_batch_loop(models):
    teacher, teacher_params = models
    module, params = student_of(teacher, teacher_params)
    optimizer, schedule = make_optimizer(optimizer_config(), 20)
    parallel = Parallel("jit", jax.devices()[:4])
    step = parallel.wrap(
        make_train_step(
            Distillation(Models(module, teacher), Recipe(), MASKING),
            optimizer,
            schedule,
            micro_batches=2,
        )
    )
    state = TrainState.create(params, optimizer)
    frozen = {"teacher": teacher_params, "masking_weights": WEIGHTS, "seed": np.uint32(0)}
    lowered = step.lower(state, frozen, parallel.shard(batch(0)))
    sizes = []
    for computation in re.split(r"\n\n", lowered.compile().as_text()):
        reductions = re.findall(r"= (.*?) all-reduce(?:-start)?\(", computation)
        if reductions and "ENTRY" not in computation.split("{")[0]:
            pytest.fail(f"a reduction outside the entry computation: {reductions}")
        for shapes in reductions:
            for dims in re.findall(r"f32\[([\d,]*)\]", shapes):
                sizes.append(int(np.prod([int(d) for d in dims.split(",") if d])))
    elements = sum(x.size for x in jax.tree.leaves(params))
    # Every parameter's gradient crosses once; what else crosses is a handful of counts and metrics.
    assert elements <= sum(sizes) <= elements + 100


def test_a_narrower_student_learns_a_projection_for_the_cosine_term(models):
    teacher, teacher_params = models
    module, params = student_of(teacher, teacher_params, hidden_size=8)
    params = {**params, PROJECTION: {"kernel": np.full((8, 16), 0.1, np.float32)}}
    rows = unmasked(batch(0))

    def cos(params):
        return loss_and_terms(Models(module, teacher), Recipe(0, 0), params, teacher_params, rows)[0]

    gradient = jax.grad(cos)(params)
    assert np.abs(gradient[PROJECTION]["kernel"]).max() > 0


def loss_and_terms(networks, recipe, params, teacher_params, rows):
    """The loss, each term divided by its own count, and the terms; without dropout."""
    counts = Distillation(networks, recipe, MASKING).counts(rows)
    scales = {name: weight / counts[name] for name, weight in recipe.weighted().items()}
    return distillation_loss(networks, recipe, params, teacher_params, rows, None, scales)


def unmasked(rows):
    """Rows with every eighth position marked as masked."""
    positions = np.tile(np.arange(1, S, 8, dtype=np.int32), (len(rows["input_ids"]), 1))
    labels = np.take_along_axis(rows["input_ids"], positions, 1)
    weights = np.take_along_axis(rows["segment_ids"], positions, 1) > 0
    return MaskedRows(
        rows["input_ids"],
        rows["segment_ids"],
        rows["positions"],
        jnp.asarray(positions),
        jnp.asarray(labels),
        jnp.asarray(weights, jnp.float32),
    )


def test_zero_weight_terms_are_not_computed(models):
    teacher, teacher_params = models
    module, params = student_of(teacher, teacher_params)
    rows = unmasked(batch(0))
    recipe = Recipe(ce=0, cos=0)
    _, terms = loss_and_terms(Models(module, teacher), recipe, params, teacher_params, rows)
    assert set(terms) == {"mlm", "mlm_accuracy", "teacher_agreement"}
    _, terms = loss_and_terms(Models(module), recipe, params, None, rows)
    assert set(terms) == {"mlm", "mlm_accuracy"}


def test_a_student_equal_to_its_teacher_has_no_distillation_loss(models):
    teacher, teacher_params = models
    module, params = student_of(teacher, teacher_params, 4)
    recipe = Recipe(mse=1.0)
    _, terms = loss_and_terms(Models(module, teacher), recipe, params, teacher_params, unmasked(batch(0)))
    means = term_means(recipe, terms)
    assert abs(means["loss_ce"]) < 1e-5 and abs(means["loss_cos"]) < 1e-5 and abs(means["loss_mse"]) < 1e-5
    assert means["teacher_agreement"] == 1.0


@pytest.mark.parametrize("ce_positions", ["all", "masked"])
def test_student_gradient_equals_pytorchs(models, ce_positions):
    """The whole loss, differentiated through the networks' outputs, against the formulas in PyTorch."""
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    teacher, teacher_params = models
    module, params = student_of(teacher, teacher_params)
    rows = unmasked(batch(0))
    recipe = Recipe(mse=0.05, ce_positions=ce_positions)

    def total(params):
        return loss_and_terms(Models(module, teacher), recipe, params, teacher_params, rows)[0]

    value, gradient = jax.value_and_grad(total)(params)

    # The student's outputs and their pull-back from JAX; the loss and its gradient at the outputs from PyTorch.
    def outputs(params):
        out = module.apply(
            {"params": params}, rows.input_ids, positions=rows.positions, segment_ids=rows.segment_ids
        )
        return out.logits, out.last_hidden_state

    (logits, hidden), pull_back = jax.vjp(outputs, params)
    target = teacher.apply(
        {"params": teacher_params}, rows.input_ids, positions=rows.positions, segment_ids=rows.segment_ids
    )
    s, h = (torch.tensor(np.asarray(x), requires_grad=True) for x in (logits, hidden))
    t, th = (torch.tensor(np.asarray(x)) for x in (target.logits, target.last_hidden_state))
    labels = np.full(rows.input_ids.shape, -100)
    np.put_along_axis(
        labels, np.asarray(rows.masked_positions), np.where(rows.masked_weights > 0, rows.labels, -100), 1
    )
    labels = torch.tensor(labels).long()
    tokens = torch.tensor(np.asarray(rows.segment_ids) > 0)
    keep = labels != -100 if ce_positions == "masked" else tokens
    T = recipe.temperature
    ce = F.kl_div(F.log_softmax(s[keep] / T, -1), F.softmax(t[keep] / T, -1), reduction="batchmean") * T**2
    mlm = F.cross_entropy(s.view(-1, V), labels.view(-1), ignore_index=-100)
    cos = F.cosine_embedding_loss(h[tokens], th[tokens], torch.ones(int(tokens.sum())))
    mse = F.mse_loss(s[keep], t[keep], reduction="sum") / keep.sum()
    loss = recipe.ce * ce + recipe.mlm * mlm + recipe.cos * cos + recipe.mse * mse
    loss.backward()
    assert abs(float(value) - loss.item()) < 1e-5 * loss.item()
    (expected,) = pull_back((jnp.asarray(s.grad.numpy()), jnp.asarray(h.grad.numpy())))
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=max(1e-4 * scale, 1e-6))


def test_evaluation_masks_are_fixed_and_do_not_depend_on_devices(models):
    teacher, teacher_params = models
    module, params = student_of(teacher, teacher_params)
    values = []
    for devices, size in ((1, 16), (8, 16), (4, 8)):
        parallel = Parallel("jit", jax.devices()[:devices])
        step = parallel.wrap(make_eval_step(Distillation(Models(module, teacher), Recipe(), MASKING), seed=7))
        frozen = parallel.replicate({"teacher": teacher_params, "masking_weights": WEIGHTS})
        placed = parallel.replicate(params)
        totals = []
        for first in range(0, B, size):
            rows = {k: v[first : first + size] for k, v in batch(5).items()}
            totals.append(
                jax.device_get(
                    step(placed, frozen, parallel.replicate(np.int32(first)), parallel.shard(rows))
                )
            )
        values.append(jax.tree.map(lambda *x: np.sum(x), *totals))
    for other in values[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), values[0], other)


def test_the_student_trains_with_dropout(models):
    a = train(models, steps=1, attention_dropout=0.5, hidden_dropout=0.5)[1]["loss"]
    b = train(models, steps=1, attention_dropout=0.0, hidden_dropout=0.0)[1]["loss"]
    assert abs(a - b) > 1e-3


def test_keys_belong_to_the_seed_the_step_and_the_row():
    def drawn(seed, step, first, count):
        keys = split_keys(example_keys(seed, jnp.int32(step), jnp.int32(first), count))
        return [tuple(data) for part in keys for data in np.asarray(jax.random.key_data(part)).tolist()]

    whole = drawn(0, 3, 0, 8)
    others = drawn(0, 4, 0, 8) + drawn(1, 3, 0, 8)
    assert len({*whole, *others}) == 2 * 3 * 8  # masking and dropout, rows, steps and seeds: all apart
    halves = [drawn(0, 3, first, 4) for first in (0, 4)]
    assert whole == [key for part in (0, 4) for half in halves for key in half[part : part + 4]]


@pytest.mark.parametrize(
    "fields", [{"ce": -1.0}, {"ce": 0, "mlm": 0, "cos": 0}, {"temperature": 0.0}, {"ce_positions": "some"}]
)
def test_recipes_outside_their_range_are_refused(fields):
    with pytest.raises(ValueError, match="expected"):
        Recipe(**fields)


def test_schedule_warms_up_and_decays_to_zero():
    config = optimizer_config()
    _, schedule = make_optimizer(config, 100)
    rates = [float(schedule(t)) for t in range(101)]
    assert rates[0] == 0 and rates[100] == 0
    assert max(rates) == pytest.approx(config.peak_lr) and rates.index(max(rates)) == 5
    np.testing.assert_allclose(np.diff(rates[5:]), -config.peak_lr / 95, rtol=1e-3)


def test_weight_decay_spares_biases_and_layer_norms(models):
    config = optimizer_config()
    config.weight_decay, config.warmup_fraction = 0.1, 0.0
    optimizer, schedule = make_optimizer(config, 10)
    params = models[1]
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    updated = optax.apply_updates(params, updates)
    layer, before = updated["encoder"]["layer_0"], params["encoder"]["layer_0"]
    np.testing.assert_array_equal(layer["ffn"]["up"]["bias"], before["ffn"]["up"]["bias"])
    np.testing.assert_array_equal(layer["ffn_norm"]["scale"], before["ffn_norm"]["scale"])
    np.testing.assert_allclose(
        layer["ffn"]["up"]["kernel"], before["ffn"]["up"]["kernel"] * (1 - config.peak_lr * 0.1), rtol=1e-6
    )


def test_weight_decay_spares_fixed_tables(models):
    table = ("encoder", "embeddings", "position", "embedding")
    mask = traverse_util.flatten_dict(decayed(models[1], {table}))
    assert mask.pop(table) is False
    assert mask["encoder", "embeddings", "word", "embedding"] is True


def test_packed_rows_give_the_loss_and_gradient_of_padded_ones_with_the_same_masks(models):
    teacher, teacher_params = models
    recipe = Recipe(mse=0.1)
    student, params = student_of(teacher, teacher_params)
    networks = Models(
        student.clone(config=student.config.replace(hidden_dropout=0.0, attention_dropout=0.0)), teacher
    )
    keys = jax.random.split(jax.random.key(3), B)
    packed = mask_tokens(keys, batch(0), jnp.asarray(WEIGHTS), MASKING)
    padded = runpy.run_path(PACKING)["unpacked"](packed)
    assert len(padded.input_ids) > 1.5 * B
    assert padded.masked_weights.sum() == packed.masked_weights.sum()

    def loss(params, rows):
        value, terms = loss_and_terms(networks, recipe, params, teacher_params, rows)
        return value, term_means(recipe, terms) | {"differentiated": value}

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    gradients, metrics = zip(gradient(params, packed), gradient(params, padded), strict=True)
    for name, value in metrics[0].items():
        np.testing.assert_allclose(value, metrics[1][name], rtol=1e-5, atol=1e-6, err_msg=name)
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
