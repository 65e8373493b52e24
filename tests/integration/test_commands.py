"""Whole commands on small real input."""

import json

import numpy as np
import pytest
from flax import traverse_util

import distiljax
from distiljax.cli import main
from distiljax.train.metrics import read_metrics


def test_a_distillation_leaves_a_whole_run_directory(distilled):
    result = json.loads((distilled / "result.json").read_text())
    assert result["steps"] == 8 and result["kind"] == "distill"
    assert result["parameters"] < result["teacher_parameters"]
    # The first step is compiled, no other one: not after a validation, a checkpoint or a last batch.
    assert result["programs"] == 1 and 0 < result["compile_seconds"] < result["seconds"]
    metrics = read_metrics(distilled)
    assert [step for step, _ in metrics["train"]["loss_ce"]] == [2, 4, 6, 8]
    assert [step for step, _ in metrics["validation"]["mlm_accuracy"]] == [0, 4, 8]
    for name in ("loss", "loss_ce", "loss_mlm", "loss_cos", "grad_norm", "learning_rate", "mlm_accuracy"):
        assert np.isfinite([value for _, value in metrics["train"][name]]).all(), name
    assert {"teacher_agreement", "tokens_per_second", "data_wait"} <= metrics["train"].keys()
    assert list((distilled / "tensorboard").iterdir())
    # A student that starts from its teacher comes nearer to it.
    losses = [value for _, value in metrics["validation"]["loss"]]
    assert losses[-1] < losses[0]


def test_a_finished_run_is_not_touched_again(distilled, teacher, flags, capsys):
    before = {
        p: p.stat().st_mtime_ns for p in distilled.rglob("*") if p.is_file() and p.name != "config.json"
    }
    assert main(["distill", f"--config.teacher={teacher}", *flags(), f"--workdir={distilled}"]) == 0
    assert "finished at step 8" in capsys.readouterr().out
    assert before == {
        p: p.stat().st_mtime_ns for p in distilled.rglob("*") if p.is_file() and p.name != "config.json"
    }


def test_pretrain_adds_a_head_and_its_run_serves_as_a_teacher(tmp_path, teacher, tokenizer, flags):
    encoder, params = distiljax.from_pretrained(teacher, head=None)
    headless = tmp_path / "headless"
    distiljax.save_pretrained(encoder, params, headless, tokenizer=tokenizer)
    adapted, run = tmp_path / "adapted", tmp_path / "run"
    assert main(["pretrain", f"--config.model={headless}", *flags(steps=4), f"--workdir={adapted}"]) == 0
    metrics = read_metrics(adapted)
    assert "loss_ce" not in metrics["train"]
    assert metrics["validation"]["loss"][-1][1] < metrics["validation"]["loss"][0][1]
    assert main(["distill", f"--config.teacher={adapted}", *flags(steps=2), f"--workdir={run}"]) == 0
    exported = tmp_path / "exported"
    assert main(["export", f"--workdir={adapted}", f"--out={exported}"]) == 0
    assert json.loads((exported / "config.json").read_text())["model_type"] == "bert"


def test_export_is_what_transformers_loads_and_comes_back_bit_for_bit(tmp_path, distilled):
    torch = pytest.importorskip("torch")
    import transformers

    out = tmp_path / "student"
    assert main(["export", f"--workdir={distilled}", f"--out={out}"]) == 0
    model, info = transformers.AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.model_type == "distilbert"

    module, params = distiljax.from_pretrained(distilled)
    back_module, back = distiljax.from_pretrained(out)
    assert back_module.config == module.config
    flat, flat_back = traverse_util.flatten_dict(params), traverse_util.flatten_dict(back)
    assert flat.keys() == flat_back.keys()
    for path, value in flat.items():
        np.testing.assert_array_equal(value, flat_back[path], err_msg="/".join(path))

    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    batch = tokenizer(["the value of an expression", "a [MASK] statement"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits.numpy()
    ours = module.apply(
        {"params": params}, batch["input_ids"].numpy(), attention_mask=batch["attention_mask"].numpy()
    )
    np.testing.assert_allclose(ours.logits, expected, atol=1e-4)
    card = (out / "README.md").read_text()
    assert "distil" in card and "hf" in card

    pipeline = transformers.pipeline("fill-mask", model=str(out), top_k=3)
    theirs = pipeline("the value of the [MASK] is true.")
    ours = next(distiljax.fill_mask(module, params, tokenizer, ["the value of the [MASK] is true."], top_k=3))
    assert [c["id"] for c in ours["masks"][0]] == [c["token"] for c in theirs]
    np.testing.assert_allclose(
        [c["score"] for c in ours["masks"][0]], [c["score"] for c in theirs], rtol=1e-4
    )


def test_evaluate_compares_teacher_student_and_its_start_on_the_same_masks(
    distilled, teacher, tmp_path, capsys
):
    assert main(["evaluate", f"--workdir={distilled}", "--rows=32", "--json"]) == 0
    evaluation = json.loads(capsys.readouterr().out)
    assert evaluation == json.loads((distilled / "evaluation.json").read_text())
    names = [model["name"] for model in evaluation["models"]]
    assert names == ["teacher", "student", "student before distillation"]
    by_name = {model["name"]: model for model in evaluation["models"]}
    assert by_name["student"]["mlm_loss"] < by_name["student before distillation"]["mlm_loss"]
    assert by_name["student"]["parameters"] == by_name["student before distillation"]["parameters"]
    # The run logged the same student on the same rows and masks.
    result = json.loads((distilled / "result.json").read_text())
    assert by_name["student"]["mlm_loss"] == pytest.approx(result["best"]["loss_mlm"], rel=1e-5)

    out = tmp_path / "evaluation.json"
    data = distilled / "data" / "validation"
    arguments = [f"--model=a={teacher}", f"--model=b={distilled}", f"--data={data}", f"--out={out}"]
    assert main(["evaluate", *arguments, "--rows=16"]) == 0
    assert "(× a)" in capsys.readouterr().out
    assert [m["name"] for m in json.loads(out.read_text())["models"]] == ["a", "b"]


def test_report_shows_the_run(distilled, tmp_path):
    assert main(["report", f"--workdir={distilled}", f"--out={tmp_path}"]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "losses.png" in text and (tmp_path / "plots" / "losses.png").stat().st_size > 10_000


def test_predict_fills_masks_from_arguments_and_files(distilled, tmp_path, capsys):
    assert main(["predict", f"--model={distilled}", "--top_k=2", "the [MASK] of a [MASK]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "the [MASK] of a [MASK]" and len(lines) == 1 + 2 * 3
    file = tmp_path / "texts.txt"
    texts = [f"{'a ' * n}[MASK]" for n in range(1, 20)]
    file.write_text("\n".join(texts))
    assert main(["predict", f"--model={distilled}", f"--file={file}", "--json", "--batch_size=4"]) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["text"] for r in results] == texts
    for result in results:
        scores = [choice["score"] for choice in result["masks"][0]]
        assert len(scores) == 5 and scores == sorted(scores, reverse=True) and sum(scores) <= 1


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_every_option_of_the_recipe_runs(tmp_path, teacher, flags, mode):
    options = flags(
        steps=2,
        micro_batch_size=1,
        student__hidden_size=16,
        student__num_heads=2,
        student__token_types="drop",
        loss__ce_positions="masked",
        loss__mse=0.1,
        optimizer__weight_decay=0.01,
        parallel__mode=mode,
        dtype="bfloat16",
        data__layout="bucketed",
        data__buckets=(16, 24),
    )
    assert main(["distill", f"--config.teacher={teacher}", *options, f"--workdir={tmp_path / 'run'}"]) == 0
    # The cosine projection of a narrower student stays behind, whatever is done with it.
    assert main(["evaluate", f"--workdir={tmp_path / 'run'}", "--rows=8"]) == 0
    for checkpoint in ("best", "last"):
        exported = tmp_path / checkpoint
        arguments = [f"--workdir={tmp_path / 'run'}", f"--out={exported}", f"--checkpoint={checkpoint}"]
        assert main(["export", *arguments]) == 0
        module, params = distiljax.from_pretrained(exported)
        assert module.config.hidden_size == 16 and set(params) == {"encoder", "head"}


def test_a_model_card_has_only_the_figures_of_what_is_exported(tmp_path, teacher, flags):
    run = tmp_path / "run"
    # The best step is not the last: the learning rate is far too high by then.
    options = flags(steps=6, eval__every=1, optimizer__peak_lr=0.5, optimizer__warmup_fraction=0.9)
    assert main(["distill", f"--config.teacher={teacher}", *options, f"--workdir={run}"]) == 0
    result = json.loads((run / "result.json").read_text())
    assert result["best_step"] < result["steps"]
    assert main(["evaluate", f"--workdir={run}", "--rows=16"]) == 0
    for checkpoint, shown in (("best", True), ("last", False)):
        out = tmp_path / checkpoint
        assert main(["export", f"--workdir={run}", f"--out={out}", f"--checkpoint={checkpoint}"]) == 0
        assert ("| teacher |" in (out / "README.md").read_text()) is shown


def test_records_are_means_over_all_steps_since_the_last(tmp_path, teacher, flags):
    losses = []
    for name, log_every in (("each", 1), ("all", 6)):
        options = flags(steps=6, log_every=log_every, eval__every=4, checkpoint__every=2)
        assert main(["distill", f"--config.teacher={teacher}", *options, f"--workdir={tmp_path / name}"]) == 0
        losses.append([value for _, value in read_metrics(tmp_path / name)["train"]["loss"]])
    assert len(losses[0]) == 6 and len(losses[1]) == 1
    assert np.mean(losses[0]) == pytest.approx(losses[1][0], rel=1e-6)
    tokens = [json.loads((tmp_path / name / "result.json").read_text())["tokens"] for name in ("each", "all")]
    assert tokens[0] == tokens[1]


def test_pretraining_a_model_that_has_a_head_starts_from_that_head(tmp_path, teacher, flags):
    before = distiljax.from_pretrained(teacher)[1]["head"]
    assert not before["bias"].any()
    trained = {**before, "norm": {**before["norm"], "bias": before["norm"]["bias"] + 0.5}}
    module, params = distiljax.from_pretrained(teacher)
    start = tmp_path / "start"
    distiljax.save_pretrained(
        module, {**params, "head": trained}, start, tokenizer=distiljax.load_tokenizer(teacher)
    )
    options = flags(steps=1, optimizer__warmup_fraction=1.0)  # the first step's learning rate is 0
    assert main(["pretrain", f"--config.model={start}", *options, f"--workdir={tmp_path / 'run'}"]) == 0
    after = distiljax.from_pretrained(tmp_path / "run")[1]["head"]
    np.testing.assert_array_equal(after["bias"], before["bias"])
