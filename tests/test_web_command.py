"""eagle-moe web: its examples and reference images, its mistakes in one line, and its end."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eagle_moe.cli import main
from eagle_moe.web.pictures import BUILT_IN, choose_examples, read_examples, reference_images

pytest.importorskip("gradio_client", reason="the extra `web` is not installed")


def test_the_built_in_examples_ask_about_each_skill_once() -> None:
    examples = choose_examples(BUILT_IN)
    assert [example.skill for example in examples] == [
        "text",
        "chart",
        "form",
        "shapes",
        "handwriting",
    ]
    assert sum(example.image.stat().st_size for example in examples) < 50_000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not a suite's question"),
        ('{"image": "a.png"}', "line 2: .*question"),
        ('{"image": "gone.png", "question": "what"}', "line 2: .*gone.png is not there"),
    ],
)
def test_a_bad_suite_is_named(tmp_path, line, message) -> None:
    (tmp_path / "test.jsonl").write_text(f'{{"question": "no image"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path)


def test_reference_images_come_from_a_suite_or_evenly_from_a_folder(tmp_path, make_image) -> None:
    assert [path.stem for path in reference_images(BUILT_IN, 2)] == ["text", "chart"]
    with pytest.raises(ValueError, match="no images in it"):
        reference_images(tmp_path, 2)
    for name in "abcdef":
        make_image().save(tmp_path / f"{name}.png")
    (tmp_path / "notes.txt").write_text("")
    assert [path.stem for path in reference_images(tmp_path, 3)] == ["a", "c", "e"]
    assert len(reference_images(tmp_path, 100)) == 6
    with pytest.raises(ValueError, match="no such folder"):
        reference_images(tmp_path / "gone", 2)


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch) -> None:
    from eagle_moe.serving.listener import listen

    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["web", "--model", str(tmp_path), "--port", port]) == 2
        assert capsys.readouterr().err.startswith(f"error: --port {port}: in use.")
    assert main(["web", "--model", str(tmp_path), "--port", "0"]) == 2
    assert "is not a model folder" in capsys.readouterr().err
    assert main(["web", "--model", str(tmp_path), "--port", "0", "--limit", "images=3"]) == 2
    assert "image_count" in capsys.readouterr().err
    monkeypatch.setattr("eagle_moe.web.server.find_spec", lambda name: None)
    assert main(["web", "--model", str(tmp_path)]) == 2
    assert "eagle-moe[web]" in capsys.readouterr().err


def test_ctrl_c_ends_it_and_nothing_is_left(tiny_folder, tmp_path) -> None:
    command = [sys.executable, "-m", "eagle_moe.cli", "web", "--model", str(tiny_folder)]
    environment = {"PATH": "", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [*command, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parent.parent,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Ask at http://127.0.0.1:"), line
        assert [path.name for path in tmp_path.glob("eagle-moe-web-*")]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("eagle-moe-web-*"))
