"""`eagle-moe serve` over HTTP: what it refuses, and that nothing that is sent ends it."""

from __future__ import annotations

import io
import json
import time
from http.client import HTTPConnection

import pytest
from PIL import Image

from tests.served import said, shown
from tests.tiny_server import QUEUE, make_images, tiny_server


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
