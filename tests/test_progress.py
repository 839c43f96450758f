from __future__ import annotations

from types import SimpleNamespace

import pytest
from rich.console import Console

from train.progress import ProgressReport

START = SimpleNamespace(is_world_process_zero=True, max_steps=4, global_step=0)
STEP = SimpleNamespace(is_world_process_zero=True, max_steps=4, global_step=2)
LOGS = ({"loss": 1.23456}, {"eval_exact_match_total": 0.5}, {"learning_rate": 1.0})


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float, str]]:
    """What the runner of a job would be told."""
    told: list[tuple[float, float, str]] = []
    monkeypatch.setattr("train.progress.progress", lambda *report: told.append(report))
    return told


def run(report: ProgressReport) -> None:
    report.on_train_begin(None, START, None)
    for logs in LOGS:
        report.on_log(None, STEP, None, logs)
    report.on_step_end(None, STEP, None)
    report.on_train_end(None, STEP, None)


def test_a_log_gets_a_line_for_each_news(
    reports: list[tuple[float, float, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run(ProgressReport("sft"))
    assert capsys.readouterr().out.splitlines() == [
        "sft: step 2/4, loss 1.23",
        "sft: step 2/4, loss 1.23, exact match 0.5",
    ]
    assert reports == [(2, 4, "loss 1.23, exact match 0.5")]


def test_waiting_for_data_is_shown_while_it_is_long(capsys: pytest.CaptureFixture[str]) -> None:
    report = ProgressReport("sft")
    for data in (0.5, 0.09):
        logs = {"loss": 1.0, "samples_per_second": 12.345, "time_step": 1.0, "time_data": data}
        report.on_log(None, STEP, None, logs)
    assert capsys.readouterr().out.splitlines() == [
        "sft: step 2/4, loss 1, samples/s 12.3, waiting for data 50%",
        "sft: step 2/4, loss 1, samples/s 12.3",
    ]


def test_a_terminal_gets_a_bar(
    reports: list[tuple[float, float, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    report = ProgressReport("sft")
    report.console = Console(stderr=True, force_terminal=True, width=100)
    run(report)
    shown = capsys.readouterr()
    assert not shown.out
    assert "sft" in shown.err and "2/4" in shown.err and "loss 1.23, exact match 0.5" in shown.err
    assert report.bar is None
