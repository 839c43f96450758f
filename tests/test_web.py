"""eagle-moe web: what the page answers, what it refuses, and that it stays up; see also
test_web_browser.py, where a browser drives it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from eagle_moe import explain
from eagle_moe.chat.session import ChatSession
from eagle_moe.limits import Limits
from eagle_moe.web.desk import Desk, load_reference
from eagle_moe.web.page import bubbles, seeing
from eagle_moe.web.pictures import BUILT_IN, choose_examples, reference_images
from eagle_moe.web.talk import EVERY, Talk

gradio_client = pytest.importorskip("gradio_client", reason="the extra `web` is not installed")

EXPERTS = ["clip", "convnext"]
TOKENS = 6


@pytest.fixture(scope="module")
def desk(tiny_model: Any, tiny_processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    session = ChatSession(tiny_model, tiny_processor)
    reference = load_reference(session, reference_images(BUILT_IN, 5), "the example pictures")
    limits = Limits(image_count=3, prompt_characters=1000, image_bytes=100_000)
    return Desk(session, reference, limits, tmp_path_factory.mktemp("desk"), TOKENS)


@pytest.fixture(scope="module")
def port(desk: Desk) -> Iterator[int]:
    from eagle_moe.web.server import serve_page
    from tests.served import in_thread

    with in_thread(serve_page(desk, choose_examples(BUILT_IN), "127.0.0.1")) as client:
        yield client.port


@pytest.fixture
def visit(port: int) -> Callable[[], Any]:
    return lambda: gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False)


@pytest.fixture
def picture(tmp_path: Path, make_image: Any) -> Path:
    make_image().save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def asked(*files: Path, text: str = "what is it") -> dict[str, Any]:
    return {"text": text, "files": [gradio_client.handle_file(str(file)) for file in files]}


def said(conversation: list[dict[str, Any]]) -> list[str]:
    """The texts of a conversation as gradio gives it."""
    parts = [part for message in conversation for part in message["content"]]
    return [part["text"] for part in parts if part["type"] == "text"]


def drawn(pieces: Any) -> None:
    for _ in pieces:
        pass


def by_hand(desk: Desk, picture: Path, silenced: set[str]) -> str:
    """What the model answers by plain `generate`, image features made by `explain`."""
    model, processor = desk.session.model, desk.session.processor
    content = [{"type": "image", "image": str(picture)}, {"type": "text", "text": "what is it"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    maps = explain.encode(model, inputs.pop("pixel_values"))
    with torch.no_grad():
        image = model.get_image_features(
            explain.silence(maps, desk.reference.means, silenced), return_dict=True
        )
    written = model.generate(
        **inputs, max_new_tokens=TOKENS, mm_encoder_outputs={"image": image}, do_sample=False
    )
    new = written[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


# Answers


def test_answers_with_and_without_an_expert_stand_side_by_side(visit, desk, picture) -> None:
    client = visit()
    whole, without = (by_hand(desk, picture, off) for off in (set(), {"clip"}))
    assert whole != without, "choose another picture: this test would see nothing"
    first = client.predict(asked(picture), EXPERTS, api_name="/ask")[0]
    assert said(first) == ["what is it", whole]
    assert [part["alt_text"] for part in first[0]["content"] if part["type"] == "file"] == [
        "picture.png"
    ]
    both = client.predict(["convnext"], api_name="/again")[0]
    assert said(both) == [
        "what is it",
        f"**every expert**\n\n{whole}",
        f"**without clip**\n\n{without}",
    ]
    # a new question with the expert off is answered twice at once
    more = client.predict(asked(text="and now"), ["convnext"], api_name="/ask")[0]
    assert said(more)[3] == "and now"
    assert [text.split("\n")[0] for text in said(more)[4:]] == [
        "**every expert**",
        "**without clip**",
    ]


def test_every_piece_of_an_answer_is_shown_as_it_comes(visit, desk, monkeypatch) -> None:
    def write(*_: Any) -> Iterator[str]:
        yield from ("red ", "green ", "blue")

    monkeypatch.setattr(desk.session.writer, "write", write)
    updates = visit().submit(asked(), EXPERTS, api_name="/ask")
    shown = [said(conversation)[-1] for conversation, *_ in updates]
    assert list(dict.fromkeys(shown)) == ["…", "red", "red green", "red green blue"]


def test_what_each_expert_added_is_what_silencing_takes(visit, desk, picture) -> None:
    client = visit()
    answer = said(client.predict(asked(picture), EXPERTS, api_name="/ask")[0])[-1]
    page = client.predict(api_name="/weigh")
    content = [{"type": "image", "image": str(picture)}, {"type": "text", "text": "what is it"}]
    prepared = explain.prepare(
        desk.session.processor, [[{"role": "user", "content": content}]], [answer]
    )
    model, means = desk.session.model, desk.reference.means
    maps = explain.encode(model, prepared.canvases)
    with torch.no_grad():
        whole = explain.score(model, prepared, maps).log_prob.item()
        for name in EXPERTS:
            silent = explain.silence(maps, means, {name})
            lost = whole - explain.score(model, prepared, silent).log_prob.item()
            figure = f"{lost:+.2f}".replace("-", "\N{MINUS SIGN}")
            row = re.search(rf'<th scope="row">{name}</th>.*?</tr>', page, re.S)
            assert row is not None
            assert figure in row[0]
    assert page.count("data:image/png;base64,") == 1 + len(EXPERTS)
    assert 'alt="clip, 4 by 4 cells: strongest in row' in page or 'alt="clip, ' in page
    assert "The figures are the claim" in page and "The colours are hints" in page
    assert "5 reference images" in page


def test_visitors_do_not_see_each_other(visit, picture) -> None:
    one, other = visit(), visit()
    one.predict(asked(picture), EXPERTS, api_name="/ask")
    assert len(said(other.predict(asked(text="hello"), EXPERTS, api_name="/ask")[0])) == 2
    conversation, *_ = one.predict(api_name="/forget")
    assert conversation == []
    with pytest.raises(gradio_client.exceptions.AppError, match="Nothing was asked yet"):
        one.predict(EXPERTS, api_name="/again")


def test_ten_visitors_at_once_are_answered_alike(visit, desk, picture) -> None:
    def ask(_: int) -> str:
        return said(visit().predict(asked(picture), EXPERTS, api_name="/ask")[0])[-1]

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(ask, range(10)))
    assert set(answers) == {by_hand(desk, picture, set())}


# Bad input


def bad_files(folder: Path) -> dict[str, Path]:
    noise = [Image.effect_noise((8, 8), deviation) for deviation in range(1, 201)]
    noise[0].save(folder / "pages.gif", save_all=True, append_images=noise[1:])
    Image.new("1", (8000, 8000)).save(folder / "bomb.png")
    (folder / "text.png").write_text("this is no picture")
    (folder / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "empty.png").write_bytes(b"")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pages.gif", "pages.gif: has 200 frames"),
        ("bomb.png", r"bomb.png: 8000 x 8000 = 64,000,000 pixels"),
        ("text.png", "text.png: is not an image"),
        ("drawing.svg", "drawing.svg: is an SVG drawing"),
        ("empty.png", "empty.png: is empty"),
    ],
)
def test_a_bad_file_is_named_and_the_next_question_answered(
    visit, picture, tmp_path, name, message
) -> None:
    client = visit()
    with pytest.raises(gradio_client.exceptions.AppError, match=message):
        client.predict(asked(bad_files(tmp_path)[name]), EXPERTS, api_name="/ask")
    assert len(said(client.predict(asked(picture), EXPERTS, api_name="/ask")[0])) == 2


@pytest.mark.parametrize(
    ("text", "pictures", "message"),
    [
        ("a" * 1_000_000, 0, "text: 1,000,000 characters, more than the limit of 1,000"),
        ("what", 4, "images: 4, more than the limit of 3"),
        ("  ", 1, "Type a question"),
        ("a" * 700, 0, "the model reads 512"),
    ],
)
def test_too_much_and_too_little_are_told(visit, picture, text, pictures, message) -> None:
    question = asked(*[picture] * pictures, text=text)
    with pytest.raises(gradio_client.exceptions.AppError, match=message):
        visit().predict(question, EXPERTS, api_name="/ask")


def test_a_file_that_is_too_large_is_not_taken(visit, tmp_path) -> None:
    (tmp_path / "large.png").write_bytes(bytes(200_000))
    with pytest.raises(ValueError, match="maximum file size of 100000 bytes"):
        visit().predict(asked(tmp_path / "large.png"), EXPERTS, api_name="/ask")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/etc/hostname", "was not uploaded by a user"),
        (str(BUILT_IN / "images" / "text.png"), "was not uploaded by a user"),
        ("http://127.0.0.1:9/picture.png", "addresses are not opened"),
    ],
)
def test_only_uploaded_files_are_opened(port, path, message) -> None:
    """By hand, because the client uploads whatever it is given."""
    from tests.served import Client

    client = Client(port)
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [{"text": "what", "files": [file]}, EXPERTS]}).encode()
    begun = client.send("POST", "/gradio_api/call/ask", body, Content_Type="application/json")
    event = begun.json["event_id"]
    told = client.send("GET", f"/gradio_api/call/ask/{event}").text
    assert told.startswith("event: error")
    assert message in told


@pytest.mark.parametrize("path", ["file=/etc/hostname", "file=..%2F..%2Fetc/hostname"])
def test_no_file_of_this_machine_is_served(port, path) -> None:
    from tests.served import Client

    assert Client(port).send("GET", f"/gradio_api/{path}").status == 403


def test_the_page_loads_nothing_from_elsewhere_and_answers_to_its_own_name(port) -> None:
    from tests.served import Client

    client = Client(port)
    page = client.send("GET", "/")
    assert page.status == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert client.send("GET", "/", Host="evil.example").status == 421
    huge = str(Limits().request_bytes + 1)
    assert client.send("POST", "/gradio_api/call/ask", b"", Content_Length=huge).status == 413
    assert client.send("POST", "/gradio_api/call/ask", Transfer_Encoding="chunked").status == 411


# One visitor's conversation


def test_limits_hold_for_a_whole_conversation(desk, picture) -> None:
    talk = Talk(desk)
    drawn(talk.ask("what", [picture] * 2))
    with pytest.raises(ValueError, match="images: 4"):
        drawn(talk.ask("what", [picture] * 2))
    drawn(talk.ask("what", [picture]))
    assert [turn.question for turn in talk.turns] == ["what", "what"]


def test_a_question_that_cannot_be_answered_is_forgotten(desk) -> None:
    talk = Talk(desk)
    with pytest.raises(ValueError, match="the model reads 512"):
        drawn(talk.ask("a" * 700, []))
    assert talk.turns == []
    with pytest.raises(ValueError, match="Nothing was answered yet"):
        talk.added()


def test_no_image_no_weights(desk) -> None:
    talk = Talk(desk)
    drawn(talk.ask("what", []))
    talk.turns[0].answers[EVERY] = "a"
    with pytest.raises(ValueError, match="No image was shown"):
        talk.added()


def test_a_stopped_answer_stays_and_the_conversation_goes_on(desk, picture) -> None:
    talk = Talk(desk)
    pieces = talk.ask("what", [picture], {"clip"})
    next(pieces)
    next(pieces)
    pieces.close()
    (turn,) = talk.turns
    assert turn.answers[EVERY]
    assert frozenset({"clip"}) not in turn.answers
    drawn(talk.ask("and", []))
    assert len(talk.turns) == 2


def test_what_follows_builds_on_the_answer_of_every_expert(desk, picture) -> None:
    talk = Talk(desk)
    drawn(talk.ask("what", [picture], {"clip"}))
    drawn(talk.ask("and", []))
    answered = talk.messages()[1]["content"][0]["text"]
    assert answered == talk.turns[0].answers[EVERY].strip()
    assert len(bubbles(talk)) == 5


@pytest.mark.parametrize(
    ("silenced", "words"),
    [
        (set(), "every expert"),
        ({"b"}, "without b"),
        ({"c", "a"}, "only b"),
        ({"a", "b", "c"}, "no expert"),
    ],
)
def test_whose_answer_it_is(silenced, words) -> None:
    assert seeing(["a", "b", "c"], silenced) == words
