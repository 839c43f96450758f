"""`eagle-moe serve` over HTTP: the answers are `generate`'s, and nothing that is sent ends it."""

from __future__ import annotations

import io
import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import pytest
from PIL import Image
from transformers.cli.serving.utils import GenerateManager

from eagle_moe.cli import main
from eagle_moe.limits import Limits
from eagle_moe.serving import launch
from eagle_moe.serving.app import ChatServer
from eagle_moe.serving.engine import USED, Engine
from tests.served import in_process, in_thread, said, shown

LIMITS = Limits(
    image_pixels=1_000_000, image_count=3, prompt_characters=1000, request_bytes=1_500_000
)
HOSTS = frozenset({"localhost", "127.0.0.1"})
QUEUE = 12


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder that requests may name files of, and a file beside it that they may not."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "images" / "red dot.png")
    Image.new("RGB", (8, 8), "blue").save(folder / "secret.png")
    (folder / "images" / "link.png").symlink_to(folder / "secret.png")
    return folder / "images"


@pytest.fixture(scope="module")
def client(tiny_model, tiny_processor, images):
    engine = Engine(tiny_model, tiny_processor, "tiny", max_new_tokens=64)
    with in_thread(ChatServer(engine, LIMITS, images).build_app(HOSTS, QUEUE)) as client:
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


# Bad input ----------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bad_images() -> dict[str, tuple[bytes | str, str]]:
    pages = [Image.new("L", (4, 4), shade) for shade in range(200)]
    return {
        "bomb": (encoded(Image.new("1", (30_000, 30_000)), "PNG"), "pixels"),
        "pages": (encoded(pages[0], "GIF", save_all=True, append_images=pages[1:]), "200 frames"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "SVG"),
        "text called png": (b"I am a picture.", "not an image"),
        "nothing": (b"", "empty"),
        "not base64": ("data:image/png;base64,%%%", "base64"),
        "not base64 said": ("data:image/png,abc", "data:image/png"),
        "address": ("http://127.0.0.1:1/a.png", "fetches nothing"),
        "plain path": ("/etc/passwd", "fetches nothing"),
        "outside": ("file:///etc/passwd", "outside"),
        "above": ("file:../secret.png", "outside"),
        "above, encoded": ("file:%2e%2e/secret.png", "outside"),
        "link to the outside": ("file:link.png", "outside"),
        "missing": ("file:none.png", "no such image"),
        "null byte": ("file:a%00.png", "not the name of a file"),
    }


@pytest.mark.parametrize(("source", "message"), bad_images().values(), ids=bad_images())
def test_a_bad_image_is_refused_by_its_number(client, make_image, source, message):
    reply = client.chat([shown(make_image()), shown(source), said("what?")])
    assert reply.status == 400
    assert reply.error.startswith("image 2: ")
    assert message in reply.error
    assert "secret" not in reply.error


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "another"}, "'tiny' is"),
        ({"max_tokens": 65}, "at most 64"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"n": 2}, "`n`"),
        ({"max_token": 5}, 'Did you mean "max_tokens"'),
        ({"generation_config": '{"num_beams": 9999}'}, "unknown key"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "unknown key"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "video_url"),
        ({"messages": [{"role": "user", "content": "a <image> that is not there"}]}, "image"),
        ({"messages": [{"role": "system", "content": "x"}] * 2}, "role"),
    ],
)
def test_a_bad_field_is_refused_by_name(client, fields, message):
    reply = client.body({"messages": [{"role": "user", "content": "hello"}], **fields})
    assert reply.status == (404 if "model" in fields else 400)
    assert message in reply.error
    assert len(reply.text) < 1000


def test_too_much_is_refused(client, make_image):
    reply = client.chat("x" * 1_000_000)
    assert (reply.status, reply.error[:25]) == (400, "text: 1,000,000 character")
    reply = client.chat([shown(make_image())] * 4)
    assert reply.status == 400
    assert "images: 4, more than the limit of 3" in reply.error
    assert client.chat("x" * 1_600_000).status == 413


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"[" * 100_000, b'{"messages": "\xff"}', b"\x00"]
)
def test_what_is_not_json_is_refused(client, body):
    reply = client.body(body)
    assert reply.status == 400
    assert "request: " in reply.error


def test_a_page_of_another_site_gets_nothing(client):
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode()
    path = "/v1/chat/completions"
    assert client.send("POST", path, body, Content_Type="text/plain").status == 415
    reply = client.send("POST", path, body, Content_Type="application/json", Host="evil.example")
    assert reply.status == 421
    assert "evil.example" in reply.error
    assert client.send("GET", "/health", Host="localhost:1234").status == 200


def test_whoever_hangs_up_makes_nobody_wait(client):
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 64}
    for _ in range(QUEUE + 2):
        connection = HTTPConnection("127.0.0.1", client.port, timeout=60)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        assert connection.getresponse().read(1)
        connection.close()
        time.sleep(0.02)
    assert client.chat("hello", max_tokens=1).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_is_told_without_its_details_and_the_next_is_answered(
    client, tiny_model, monkeypatch, stream
):
    def fail(**_: object) -> None:
        raise RuntimeError('out of "memory" at /home/somebody')

    with monkeypatch.context() as broken:
        broken.setattr(tiny_model, "generate", fail)
        reply = client.chat("hello", stream=stream)
    error = reply.events[-1]["error"] if stream else reply.json["error"]
    assert error["type"] == "server_error"
    assert "somebody" not in reply.text
    assert client.chat("hello", max_tokens=1).status == 200


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
