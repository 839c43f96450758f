from __future__ import annotations

import io
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from eagle_moe import cli, doctor
from eagle_moe.chat import terminal
from eagle_moe.chat.session import ChatSession

ROOT = Path(__file__).parents[1]


@pytest.fixture
def session(tiny_model, tiny_processor) -> ChatSession:
    return ChatSession(tiny_model, tiny_processor)


@pytest.fixture
def photo(tmp_path, make_image) -> str:
    make_image().save(tmp_path / "my photo.png")
    return str(tmp_path / "my photo.png")


def generated(tiny_model, tiny_processor, prompt: str, images: list | None, tokens: int) -> str:
    inputs = tiny_processor(text=prompt, images=images, return_tensors="pt")
    output = tiny_model.generate(**inputs, max_new_tokens=tokens)[0, inputs["input_ids"].shape[1] :]
    return tiny_processor.decode(output, skip_special_tokens=True)


# The console script


def test_help_is_quick_and_imports_no_torch():
    """Half a second at most, counted in CPU time: a loaded machine must not fail it."""
    code = (
        "import sys; sys.argv[0] = 'eagle-moe'\nfrom eagle_moe.cli import main\n"
        "try: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("experts", "chat", "doctor"))
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 0.5


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("eagle-moe ")


def test_experts_list_and_check(capsys):
    assert cli.main(["experts", "list"]) == 0
    output = capsys.readouterr().out
    assert "clip-tiny" in output
    assert "eva02" in output
    assert cli.main(["experts", "check", "clip-tiny", "arch.layers=1"]) == 0
    assert "keeps the contract" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experts", "check", "clpi"], 'no expert "clpi". Did you mean "clip"'),
        (["chat", "--model", "/nowhere/at-all", "--prompt", "hi"], "/nowhere/at-all"),
        (["chat", "--model", str(ROOT), "--prompt", "hi"], "is not a model folder"),
        (["chat", "--model", str(ROOT), "--max-new-tokens", "0"], "must be at least 1"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, capsys):
    assert cli.main(arguments) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.startswith("error: ")
    assert output.out == ""


# Chat


def test_one_shot_answer(tiny_folder, tiny_model, tiny_processor, photo, make_image, capsys):
    arguments = ["--model", str(tiny_folder), "--image", photo, "--max-new-tokens", "6"]
    assert cli.main(["chat", *arguments, "--device", "cpu", "--prompt", "what?"]) == 0
    prompt = "USER: <image>\nwhat? ASSISTANT:"
    expected = generated(tiny_model, tiny_processor, prompt, [make_image()], 6)
    assert capsys.readouterr().out == expected + "\n"


def test_the_device_is_one_that_is_there(tiny_folder, capsys):
    session = ChatSession.load(tiny_folder)
    assert session.model.device.type in ("cpu", "cuda", "mps", "xpu")
    if not torch.cuda.is_available():
        assert cli.main(["chat", "--model", str(tiny_folder), "--device", "cuda"]) == 2
        assert "error: device: cuda: " in capsys.readouterr().err


def test_a_bad_image_ends_a_one_shot(tiny_folder, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"")
    arguments = ["--model", str(tiny_folder), "--image", str(tmp_path / "a.png"), "--prompt", "x"]
    assert cli.main(["chat", "--device", "cpu", *arguments]) == 2
    assert "a.png: is empty" in capsys.readouterr().err


def test_streaming_gives_the_same_text_in_pieces(session, tiny_model, tiny_processor, make_image):
    session.add_image(make_image())
    pieces = list(session.ask("what?", 12))
    prompt = "USER: <image>\nwhat? ASSISTANT:"
    assert "".join(pieces) == generated(tiny_model, tiny_processor, prompt, [make_image()], 12)


def test_turns_and_images_accumulate(session, tiny_model, tiny_processor, make_image):
    session.add_image(make_image(seed=1))
    first = "".join(session.ask("one?", 5)).strip()
    session.add_image(make_image(seed=2))
    second = "".join(session.ask("two?", 5))
    prompt = f"USER: <image>\none? ASSISTANT: {first}</s>USER: <image>\ntwo? ASSISTANT:"
    images = [make_image(seed=1), make_image(seed=2)]
    assert second == generated(tiny_model, tiny_processor, prompt, images, 5)
    session.reset()
    assert session.turns == []


def test_a_reader_who_leaves_stops_the_writer(session, tiny_model, monkeypatch):
    written = []
    forward = tiny_model.forward
    monkeypatch.setattr(
        tiny_model, "forward", lambda *a, **k: written.append(1) or forward(*a, **k)
    )
    pieces = session.ask("x" * 10, 300)
    next(pieces)
    pieces.close()
    assert len(written) < 300
    assert [turn["role"] for turn in session.turns] == ["user", "assistant"]


def test_errors_of_the_writer_reach_the_reader(session, tiny_model, monkeypatch):
    def fail(**_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tiny_model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(session.ask("x", 3))


def test_too_long_a_conversation_names_the_numbers(session):
    with pytest.raises(ValueError, match=r"has \d+ tokens and the answer may have 500.*reads 512"):
        list(session.ask("x" * 20, 500))
    assert session.turns == []


def test_conversation_over_a_pipe(session, photo, tmp_path, monkeypatch, capsys):
    lines = ["hi", "", "/image", f"/image {photo}", "what?", f"/image {tmp_path}/no.png"]
    lines += ["/rest", "/help", "/reset", "again", "/quit", "never asked"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    asked = []
    ask = session.ask
    monkeypatch.setattr(session, "ask", lambda text, n: asked.append(text) or ask(text, n))
    terminal.run_chat(session, [], None, 3)
    output = capsys.readouterr()
    assert asked == ["hi", "what?", "again"]
    assert len(output.out.splitlines()) >= 3
    errors = output.err.splitlines()
    assert [line.split(".")[0] for line in errors if "no.png" not in line] == [
        "error: /image: give a file",
        "error: no command /rest",
    ]
    assert any("no such image file" in line for line in errors)
    assert len(session.turns) == 2  # after /reset


def test_a_person_is_told_what_answers(session):
    line = terminal.describe(session)
    assert line.startswith("clip + convnext -> llama")
    assert "16 tokens per image" in line


# Doctor

FAKE = {
    "pillow>=11": None,
    "no-such-package>=1": None,
    "pytest>=999": None,
    "no-such-extra>=1 ; extra == 'web'": None,
    "eagle-moe[train] ; extra == 'dev'": None,
}


def test_doctor_says_what_is_missing_and_why(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "requires", lambda _: list(FAKE))
    findings = {f.requirement: f for f in doctor.examine()}
    assert findings["pillow>=11"].problem is None
    assert findings["no-such-package>=1"].problem == "not installed"
    assert findings["pytest>=999"].problem == "needs >=999"
    assert findings["no-such-extra>=1"] == doctor.Finding("web", "no-such-extra>=1", None, None)
    assert len(findings) == 4

    def broken(name: str) -> None:
        raise ImportError("libcudart.so.11: cannot open shared object file")

    monkeypatch.setattr(doctor, "import_module", broken)
    (found,) = [f for f in doctor.examine() if f.requirement == "pillow>=11"]
    assert found.problem == "ImportError: libcudart.so.11: cannot open shared object file"


def test_doctor_prints_a_table(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "requires", lambda _: ["pillow>=11", "gradio>=5; extra == 'web'"])
    monkeypatch.setattr(doctor, "version", lambda name: {"pillow": "12"}.get(name) or missing(name))
    assert doctor.run_doctor() == 0
    output = capsys.readouterr().out
    assert "pip install 'eagle-moe[web]'" in output
    monkeypatch.setattr(doctor, "requires", lambda _: ["no-such-package"])
    assert doctor.run_doctor() == 1


def missing(name: str) -> str:
    if name == "eagle-moe":
        return "0"
    raise doctor.PackageNotFoundError(name)


def test_every_extra_has_a_purpose():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(doctor.PURPOSES) == set(project["optional-dependencies"])
