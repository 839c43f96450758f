"""eagle_moe/hub/scan.py: what must not be published is found, and nothing else is."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from eagle_moe.hub.scan import Machine, scan_folder, scan_text, without_local_paths

NOBODY = Machine()
LETTERS = "".join(chr(ord("a") + i % 26) for i in range(40))


def found(folder, machine=NOBODY) -> list[str]:
    return [str(one) for one in scan_folder(folder, machine)]


# Put together here, so that no scanner takes this file for a leak.
@pytest.mark.parametrize(
    "text",
    [
        "token: hf_" + LETTERS[:34],
        '{"key": "sk-' + "proj-1" + LETTERS[:30] + '"}',
        "OPENAI=sk-" + LETTERS[:20] + "4",
        "aws AKIA" + "ABCDEFGH12345678",
        "ghp_" + LETTERS[:36],
        "glpat-" + LETTERS[:20],
        "-----BEGIN RSA " + "PRIVATE KEY-----",
        "-----BEGIN " + "PRIVATE KEY-----",
        "Authorization: Bearer " + LETTERS[:20] + "17",
        '"api_key": "' + LETTERS[:12] + "99" + '"',
        "password = " + LETTERS[:12] + "1",
        "https://me:" + "pass@example.org/x",
    ],
)
def test_a_secret_is_found_and_not_repeated(text, tmp_path):
    (tmp_path / "notes.md").write_text(f"first line\n{text}\n")
    (line,) = found(tmp_path)
    assert line.startswith("notes.md:2: ")
    assert LETTERS[:12] not in line and "12345678" not in line


@pytest.mark.parametrize(
    "path",
    [
        "/home/alice/runs/model",
        "/Users/alice/model",
        "/root/model",
        "/tmp/model",
        "/mnt/disk1/data.jsonl",
        "/scratch/alice/x",
        "file:///home/alice/x",
        "C:\\Users\\alice\\x",
        "C:\\\\Users\\\\alice\\\\x",
        "/data/coco/train2017",
        "/private/var/folders/x",
    ],
)
def test_a_local_path_is_found_wherever_it_stands(path, tmp_path):
    quoted = [path, f'"{path}"', f"'{path}',", f"--out={path}", f"[{path}]", f"see {path}."]
    (tmp_path / "a.yaml").write_text("\n".join(quoted))
    assert len(found(tmp_path)) == len(quoted)


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/data/sets and http://example.org/home/alice/page",
        "org/home/model", "runs/demo/model", "./data/x", "~/data/x", "../tmp/x",
        "/usr/lib/python3/x", "/data", "a/data/b", "and/or", "1/2",
        "task-sk-learning-2-of-many-tasks-here", "sk-learn", "hf_model", "hf_hub_download",
        "bearer of good news in a very long sentence", "Bearer $TOKEN",
        "max_new_tokens: 128, eos_token: </s>, tokens=1024", "password: ", "api_key = None",
        "sha256 e72db711cac8d9789b07acf7da944ce9edb59c95b5aefb2c762dea8a9d07e503",
        "mailto:someone@example.org", "https://example.org:8000/x@y", "git@github.com:a/b.git",
        "{% if root/tmp %}", "<home/>", "10:30:00", "C:/x", "-----BEGIN PUBLIC KEY-----",
        "-----BEGIN CERTIFICATE-----", "eyJhbGciOiJ9",
    ],
)  # fmt: skip
def test_ordinary_text_is_left_alone(text):
    assert scan_text(text, "a.md", NOBODY) == []


def test_the_files_of_a_model_are_left_alone(tiny_folder):
    assert found(tiny_folder) == []


def test_entries_of_a_vocabulary_are_not_paths_but_may_be_secrets(tmp_path):
    text = json.dumps({"/tmp/x": 1, "hf_" + LETTERS[:34]: 2})
    (tmp_path / "vocab.json").write_text(text)
    (tmp_path / "other.json").write_text(text)
    assert [line.split(":")[0] for line in found(tmp_path)] == 2 * ["other.json"] + ["vocab.json"]


def test_names_of_this_account_and_machine_are_found(tmp_path):
    machine = Machine("alice", "gpu-07", "/srv/people/alice")
    (tmp_path / "a.txt").write_text(
        "/srv/people/alice/x\nrun by alice@gpu-07\non gpu-07.\nalice\ngpu-075\n/srv/people/alices\n"
    )
    lines = [(one.line, one.what.split(" (")[0]) for one in scan_folder(tmp_path, machine)]
    assert lines == [
        (1, "this account's home folder"),
        (2, "this account and machine"),
        (2, "this machine's name"),
        (3, "this machine's name"),
    ]
    plain = Machine("root", "vm", "/root")
    (tmp_path / "a.txt").write_text("the root of a vm\n")
    assert found(tmp_path, plain) == []


def test_texts_inside_other_files_are_read(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"from": "/home/al/x"})
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{}\n{"model": "/home/al/x"}\n'))
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Source", "/home/al/x")
    Image.new("RGB", (2, 2)).save(tmp_path / "c.png", pnginfo=texts)
    assert found(tmp_path) == [
        "a.safetensors: a local path (/home/al/x)",
        "b.jsonl.gz:2: a local path (/home/al/x)",
        "c.png: a local path (/home/al/x)",
    ]
    save_file({"/home/al/x": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    Image.new("RGB", (2, 2)).save(tmp_path / "c.png")
    assert len(found(tmp_path)) == 1


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("training_args.bin", "pickle"),
        ("sub/weights.PT", "pickle"),
        ("optimizer.safetensors", "state of a training run"),
        ("global_step10/x.json", "state of a training run"),
        ("logs/events.out.tfevents.1", "a log"),
        (".env", "credentials"),
        (".env.local", "credentials"),
        ("id_rsa", "credentials"),
        ("__pycache__/a.cpython-311.pyc", "leftover"),
        ("model.safetensors.part", "leftover"),
        ("a.dat", "cannot be read"),
        ("torn.safetensors", "cannot be read"),
        ("torn.jsonl.gz", "cannot be read"),
    ],
)
def test_files_that_do_not_belong_are_named_without_being_opened_as_such(name, what, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\x80\x04\x95\xff")
    (line,) = found(tmp_path)
    assert line.startswith(f"{name}: ") and what in line


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "outside").write_text("x")
    inside = tmp_path / "release"
    inside.mkdir()
    (inside / "config.json").symlink_to(tmp_path / "outside")
    assert found(inside) == ["config.json: a link: put the file itself here"]


def test_local_paths_are_shortened_and_the_rest_is_kept():
    data = {
        "init": {"experts": {"sam": "/home/al/store/sam-1"}, "llm": "lmsys/vicuna-7b-v1.5"},
        "history": ["/data/clip.pt: clip.pt (OpenAI)", "sft"],
        "home": "C:\\Users\\al\\model\\",
        "n": 3,
        "nothing": None,
        "url": "https://example.org/home/x",
    }
    short = without_local_paths(data)
    assert short == {
        "init": {"experts": {"sam": "sam-1"}, "llm": "lmsys/vicuna-7b-v1.5"},
        "history": ["clip.pt: clip.pt (OpenAI)", "sft"],
        "home": "model",
        "n": 3,
        "nothing": None,
        "url": "https://example.org/home/x",
    }
    assert scan_text(json.dumps(short), "a.json", NOBODY) == []
