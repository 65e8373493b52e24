from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr

import pytest
from absl import logging

from distiljax.train.progress import PLAIN_INTERVAL, CountProgress, Progress, stage

VALUES = {
    "loss": 3.2145,
    "loss_ce": 2.1,
    "loss_mlm": 3.3,
    "loss_cos": 0.0513,
    "mlm_accuracy": 0.412,
    "tokens_per_second": 412_345.0,
    "learning_rate": 1e-4,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def terminal(monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


def test_off_a_terminal_one_plain_line_an_interval_and_the_last():
    stream, clock = io.StringIO(), Clock()
    with Progress("Distilling", 1000, stream=stream, clock=clock) as progress:
        for step in range(10, 110, 10):
            clock.now += PLAIN_INTERVAL / 4
            progress.update(step, VALUES)
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"Distilling: step {step} of 1" for step in (10, 50, 90, 100)
    ]
    assert "\x1b" not in stream.getvalue() and "━" not in stream.getvalue()
    assert lines[-1] == (
        "Distilling: step 100 of 1,000, loss 3.21 (ce 2.10, mlm 3.30, cos 0.0513), accuracy 41.2 %, "
        "412 k tokens/s, 1 min 15 s elapsed, 11 min 15 s left"
    )


def test_the_last_line_is_not_repeated():
    stream = io.StringIO()
    with Progress("Distilling", 10, stream=stream) as progress:
        progress.update(10, {"loss": 1.0})
    assert stream.getvalue().count("\n") == 1


def test_the_default_stream_is_standard_error(capsys):
    with Progress("Distilling", 10) as progress:
        progress.update(1, {"loss": 1.0})
    stage("Adapting the teacher", 2, 6)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "Distilling: step 1 of 10, loss 1.00, 0 s elapsed\n[2/6] Adapting the teacher\n"


def test_disabled_shows_nothing(terminal):
    with redirect_stderr(terminal):
        with Progress("Distilling", 10, enabled=False) as progress:
            progress.update(10, VALUES)
        with CountProgress("Preparing", enabled=False) as count:
            count.update(10, 100)
        stage("Adapting", 1, 2, enabled=False)
    assert terminal.getvalue() == ""


def test_a_terminal_gets_a_bar_and_logging_goes_above_it(terminal, monkeypatch):
    handler = logging.get_absl_handler().python_handler
    monkeypatch.setattr(handler, "stream", terminal)
    with redirect_stderr(terminal), Progress("Distilling", 10_000, start_step=4_000) as progress:
        assert handler.stream is not terminal
        handler.stream.write("saved checkpoint\n")
        progress.update(5_000, VALUES)
    shown = terminal.getvalue()
    assert handler.stream is terminal
    for text in ("Distilling", "━", "5,000/10,000", "cos 0.0513", "412 k tokens/s", "saved checkpoint\n"):
        assert text in shown


def test_the_bar_is_taken_down_when_the_work_fails(terminal):
    with redirect_stderr(terminal):
        with pytest.raises(RuntimeError, match="boom"), Progress("Distilling", 10):
            assert sys.stderr is not terminal
            raise RuntimeError("boom")
        assert sys.stderr is terminal
    assert terminal.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


def test_a_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with redirect_stderr(terminal), Progress("Distilling", 10) as progress:
        progress.update(1, {"loss": 1.0})
    assert terminal.getvalue() == "Distilling: step 1 of 10, loss 1.00, 0 s elapsed\n"


def test_time_left_counts_from_the_first_update_of_a_resumed_run():
    stream, clock = io.StringIO(), Clock()
    with Progress("Distilling", 1000, start_step=500, stream=stream, clock=clock) as progress:
        clock.now += 300  # compilation
        progress.update(510, {})
        clock.now += 40
        progress.update(550, {})
    assert stream.getvalue().splitlines()[-1].endswith("7 min 30 s left")


def test_count_progress_with_an_unknown_total():
    stream, clock = io.StringIO(), Clock()
    with CountProgress("Preparing wikipedia", stream=stream, clock=clock) as progress:
        clock.now += 10
        progress.update(1_234, 500_000)
    assert stream.getvalue() == (
        "Preparing wikipedia: 1,234 documents, 500 k tokens, 50.0 k tokens/s, 10 s elapsed\n"
    )


def test_count_progress_with_a_known_total():
    stream, clock = io.StringIO(), Clock()
    with CountProgress("Reading", total=100, unit="rows", stream=stream, clock=clock) as progress:
        progress.update(10)
        clock.now += PLAIN_INTERVAL
        progress.update(40)
    assert stream.getvalue().splitlines() == [
        "Reading: 10/100 rows, 0 s elapsed",
        "Reading: 40/100 rows, 30 s elapsed, 1 min left",
    ]


def test_count_progress_on_a_terminal(terminal):
    with redirect_stderr(terminal), CountProgress("Preparing wikipedia") as progress:
        progress.update(1_234, 500_000)
    assert "1,234 documents" in terminal.getvalue() and "500 k tokens" in terminal.getvalue()


def test_a_stage_heading_keeps_its_brackets_on_a_terminal(terminal):
    with redirect_stderr(terminal):
        stage("Adapting the teacher", 2, 6)
    assert "[2/6] Adapting the teacher" in terminal.getvalue()


def test_losses_that_are_not_finite_show_as_a_dash():
    stream = io.StringIO()
    with Progress("Distilling", 10, stream=stream) as progress:
        progress.update(1, {"loss": float("nan")})
    assert "loss –" in stream.getvalue()
