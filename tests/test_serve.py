"""`eagle-moe serve` over HTTP: the answers are `generate`'s; and the command that starts it."""

from __future__ import annotations

import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image
from transformers.cli.serving.utils import GenerateManager

from eagle_moe.cli import main
from eagle_moe.serving import launch
from eagle_moe.serving.engine import USED
from tests.served import in_process, said, shown
from tests.tiny_server import make_images, tiny_server


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def client(tiny_model, tiny_processor, images):
    with tiny_server(tiny_model, tiny_processor, images) as client:
        yield client


@pytest.fixture(autouse=True)
def stays_up(client):
    yield
    assert client.send("GET", "/health").json == {"status": "ok"}


@pytest.fixture(scope="module")
def expected(tiny_model, tiny_processor):
    """What `generate` answers to a question with images, given as the template has it."""

    def answer(pictures: list[Image.Image], question: str, **settings: object) -> str:
        placeholders = "<image>\n" * len(pictures)
        text = f"USER: {placeholders}{question} ASSISTANT:"
        inputs = tiny_processor(text=text, images=pictures or None, return_tensors="pt")
        settings = {"max_new_tokens": 8, "do_sample": False, **settings}
        ids = tiny_model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
        return tiny_processor.decode(ids, skip_special_tokens=True)

    return answer


# Answers ------------------------------------------------------------------------------------------


def test_an_answer_is_that_of_generate(client, expected, make_image):
    for pictures in ([], [make_image()], [make_image(seed=1), make_image(90, 20, seed=2)]):
        reply = client.chat([*map(shown, pictures), said("what?")], max_tokens=8)
        assert reply.answer == expected(pictures, "what?")
        assert reply.json["model"] == "tiny"
        assert reply.json["usage"]["completion_tokens"] == 8
        assert reply.json["choices"][0]["finish_reason"] == "length"
    assert reply.json["usage"]["prompt_tokens"] > 2 * 16


def test_a_stream_is_the_same_answer_in_pieces(client, expected, make_image):
    content = [shown(make_image()), said("what?")]
    reply = client.chat(content, max_completion_tokens=8, stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    first, *middle, last = (event["choices"][0] for event in reply.events)
    assert first["delta"]["role"] == "assistant"
    assert len(middle) > 2
    assert "".join(piece["delta"]["content"] for piece in middle) == expected(
        [make_image()], "what?"
    )
    assert last["finish_reason"] == "length"
    assert reply.events[-1]["usage"]["completion_tokens"] == 8


def test_ten_users_at_once_get_their_own_answers(client, expected, make_image):
    def ask(seed: int) -> str:
        content = [shown(make_image(seed=seed)), said(f"q{seed}")]
        if seed % 2:
            return client.chat(content, max_tokens=8).answer
        events = client.chat(content, max_tokens=8, stream=True).events
        return "".join(event["choices"][0]["delta"].get("content", "") for event in events)

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(ask, range(10)))
    for seed, answer in enumerate(answers):
        # a stream leaves out the first bytes of a character that never came to an end
        whole = expected([make_image(seed=seed)], f"q{seed}")
        assert answer.rstrip("\ufffd") == whole.rstrip("\ufffd")
    assert len(set(answers)) > 5, "the images make no difference: the test could not fail"


def test_earlier_turns_are_read(client, tiny_model, tiny_processor, make_image):
    picture = make_image()
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [shown(picture), said("one?")]},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three?"},
    ]
    text = "Be brief. USER: <image>\none? ASSISTANT: two</s>USER: three? ASSISTANT:"
    inputs = tiny_processor(text=text, images=picture, return_tensors="pt")
    ids = tiny_model.generate(**inputs, max_new_tokens=6, do_sample=False)
    reply = client.body({"messages": turns, "max_tokens": 6})
    assert reply.json["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]
    assert reply.answer == tiny_processor.decode(ids[0, -6:], skip_special_tokens=True)


def test_a_seed_and_a_temperature_draw_the_same_answer_again(client):
    def draw(seed: int) -> str:
        return client.chat("hello", max_tokens=16, temperature=1.5, seed=seed).answer

    with ThreadPoolExecutor(6) as pool:
        first, *others = pool.map(draw, [1, 2, 1, 3, 1, 4])
    assert first == others[1] == others[3]
    assert len({first, *others}) == 4
    assert client.chat("hello", max_tokens=16, temperature=0).answer not in {first, *others}


def test_a_stop_string_ends_the_answer(client, expected):
    whole = expected([], "what?", max_new_tokens=16)
    stop = next(character for character in whole[2:] if " " < character < "~")
    reply = client.chat("what?", max_tokens=16, stop=[stop])
    assert reply.answer == whole[: whole.index(stop) + 1]
    assert reply.json["choices"][0]["finish_reason"] == "stop"


def test_an_image_of_the_folder_is_opened_by_name(client, images, expected):
    red = Image.new("RGB", (8, 8), "red")
    for name in ("file:red%20dot.png", "file:red dot.png", (images / "red dot.png").as_uri()):
        reply = client.chat([shown(name), said("what?")], max_tokens=8)
        assert reply.answer == expected([red], "what?")


def test_an_answer_is_shortened_to_the_room_that_the_prompt_leaves(client):
    reply = client.chat("x" * 480, max_tokens=64)
    assert reply.json["usage"]["total_tokens"] == 512
    assert reply.json["choices"][0]["finish_reason"] == "length"
    for stream in (False, True):
        reply = client.chat("x" * 600, stream=stream)
        assert reply.status == 400
        assert "the model reads 512" in reply.error


def test_models_and_unknown_paths(client):
    (model,) = client.send("GET", "/v1/models").json["data"]
    assert model["id"] == "tiny"
    assert client.chat("hello", model="tiny", max_tokens=1).status == 200
    for method, path in [("GET", "/v1/chat/completions"), ("POST", "/load_model"), ("GET", "/")]:
        reply = client.send(method, path, b"{}")
        assert reply.status in (404, 405)
        assert reply.error


# The command --------------------------------------------------------------------------------------


def test_a_full_queue_turns_away_and_interrupting_ends_it(tiny_folder):
    with in_process(tiny_folder, "--queue", "1") as (client, process):
        (model,) = client.send("GET", "/v1/models").json["data"]
        assert model["id"] == tiny_folder.name
        held = socket.create_connection(("127.0.0.1", client.port))
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
        held.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())  # and no body
        deadline = time.monotonic() + 60
        while (reply := client.chat("hello", max_tokens=1)).status == 200:
            assert time.monotonic() < deadline, "the queue is never full"
        assert reply.status == 429
        assert int(reply.headers["retry-after"]) > 0
        assert "Try again later" in reply.error
        held.close()
        while client.chat("hello", max_tokens=1).status == 429:
            assert time.monotonic() < deadline, "who hung up keeps its place"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port 70000: must be 0 to 65535"),
        (["--queue", "0"], "--queue 0: must be at least 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--image-folder", "/nowhere"], "--image-folder /nowhere: no such folder"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--limit", "image_byte=5"], 'Did you mean "image_bytes"'),
        (["--port", "0", "--model-is-missing"], "unrecognized arguments"),
        (["--port", "0"], "/nowhere"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, capsys):
    try:
        code = main(["serve", "/nowhere", *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_a_missing_library_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(launch, "NEEDED", ("uvicorn", "no_such_library"))
    assert main(["serve", "/nowhere"]) == 2
    assert "serving needs no_such_library. Run: pip install 'eagle-moe[serve]'" in (
        capsys.readouterr().err
    )


def test_an_engine_of_another_make_is_refused(monkeypatch, tiny_folder, capsys):
    monkeypatch.setitem(USED, GenerateManager, ["generate_backwards"])
    assert main(["serve", str(tiny_folder), "--port", "0"]) == 2
    assert "its server has no GenerateManager.generate_backwards" in capsys.readouterr().err


def test_a_port_in_use_is_told(client, capsys):
    assert main(["serve", "/nowhere", "--port", str(client.port)]) == 2
    assert "in use. Give another" in capsys.readouterr().err
