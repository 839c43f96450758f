"""eagle_moe/integrations: what lmms-eval asks is answered, in its order, however it is batched."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from PIL import Image

from eagle_moe.answer import Answerer
from eagle_moe.integrations import lmms_eval_models

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import Instance
from lmms_eval.models.registry_v2 import ModelRegistryV2

from eagle_moe.integrations.lmms_eval import EagleMixBackend, key_of

GREEDY = {"max_new_tokens": 8, "until": ["\n\n"], "do_sample": False}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """Texts of all lengths; none, one or two images; the same image in several rows."""
    colours = ["red", "navy", "green", "white"]
    images = [Image.new("RGB", (30 + 9 * i, 40), colour) for i, colour in enumerate(colours)]
    for image in images:
        image.paste((9, 99, 199), (5, 5, 15, 25))
    return [
        {"text": f"question {'very ' * ((7 * i) % 5)}{i}", "images": images[i % 4 :][: i % 3]}
        for i in range(13)
    ]


def to_messages(row: dict) -> list[dict]:
    parts = [{"type": "image", "url": image} for image in row["images"]]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": row["text"]}]}]


def instance(rows: list[dict], index: int, settings: dict, **metadata) -> Instance:
    return Instance(
        request_type="generate_until",
        arguments=(rows[index]["text"], to_messages, dict(settings), index, "toy", "test"),
        idx=0,
        metadata={"task": "toy", "doc_id": index, "repeats": 1, **metadata},
    )


@pytest.fixture
def make(tiny_model, tiny_processor, rows):
    def make(**options) -> EagleMixBackend:
        backend = EagleMixBackend(answerer=Answerer(tiny_model, tiny_processor), **options)
        backend.task_dict = {"toy": {"test": rows}}
        return backend

    return make


@pytest.fixture(scope="module")
def alone(tiny_model, tiny_processor, rows) -> list[str]:
    """Every row asked by itself, without the backend."""
    answerer = Answerer(tiny_model, tiny_processor)
    texts = []
    for row in rows:
        parts = [{"type": "image", "image": image} for image in row["images"]]
        content = [*parts, {"type": "text", "text": row["text"]}]
        asked = [{"role": "user", "content": content}]
        texts += answerer([asked], until=["\n\n"], max_new_tokens=8)
    return texts


@pytest.mark.parametrize("batch_size", [1, "4", 64])
def test_answers_come_in_the_order_of_the_requests(make, rows, alone, batch_size):
    backend = make(batch_size=batch_size)
    requests = [instance(rows, index, GREEDY) for index in range(len(rows))]
    assert backend.generate_until(requests) == alone
    assert len(set(alone)) > 8
    assert backend.asked == len(rows)
    assert backend.seconds > 0
    assert (backend.images_seen, backend.images_encoded) == (sum(i % 3 for i in range(13)) - 1, 4)


def test_batches_hold_like_lengths_and_one_way_of_generating(make, rows, monkeypatch):
    batches: list[tuple[list[int], dict]] = []
    generate = Answerer.generate

    def watching(self, inputs, **settings):
        batches.append((inputs["attention_mask"].sum(1).tolist(), settings))
        return generate(self, inputs, **settings)

    monkeypatch.setattr(Answerer, "generate", watching)
    texts = [{"text": row["text"], "images": []} for row in rows]
    backend = make(batch_size=3)
    backend.task_dict = {"toy": {"test": texts}}
    short = GREEDY | {"max_new_tokens": 2, "until": "x", "temperature": 0.7}
    requests = [instance(texts, index, short if index < 4 else GREEDY) for index in range(13)]
    backend.generate_until(requests)
    assert [len(lengths) for lengths, _ in batches] == [3, 1, 3, 3, 3]
    for group in (batches[:2], batches[2:]):
        flat = [length for lengths, _ in group for length in lengths]
        assert flat == sorted(flat, reverse=True)
    assert batches[0][1] == {"until": ("x",), "max_new_tokens": 2, "num_beams": 1}
    assert batches[4][1] == {"until": ("\n\n",), "max_new_tokens": 8, "num_beams": 1}


def test_known_answers_are_not_asked_again_and_batches_stay_as_they_were(make, rows, alone):
    requests = [instance(rows, index, GREEDY) for index in range(len(rows))]
    known: dict[str, str] = {}
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(batch_size=4, answers=known, on_answers=stop).generate_until(requests)
    assert seen == [(4, 13), (8, 13)]
    assert len(known) == 8
    torn = next(iter(known))
    del known[torn]
    kept = dict(known)
    backend = make(batch_size=4, answers=known)
    assert backend.generate_until(requests) == alone
    assert backend.asked == 13 - 4  # the torn batch is asked as a whole
    assert {key: known[key] for key in kept} == kept
    again = make(batch_size=4, answers=known)
    assert again.generate_until(requests) == alone
    assert again.asked == 0
    assert len({key_of(request) for request in requests}) == len(requests)


def test_requests_that_only_fill_up_a_process_are_not_asked(make, rows, alone):
    requests = [instance(rows, 0, GREEDY), instance(rows, 0, GREEDY, __padding_only__=True)]
    backend = make()
    assert backend.generate_until(requests) == [alone[0], ""]
    assert backend.asked == 1


def test_the_entry_point_leads_to_the_backend(tiny_folder, rows, alone):
    registry = ModelRegistryV2()
    registry.register_manifest(lmms_eval_models())
    backend = registry.get_model_class("eagle_moe").create_from_arg_string(
        f"pretrained={tiny_folder},dtype=float32", {"batch_size": "4", "device": "cpu"}
    )
    backend.task_dict = {"toy": {"test": rows}}
    requests = [instance(rows, index, GREEDY) for index in range(len(rows))]
    assert backend.generate_until(requests) == alone
    backend.clean()  # lmms-eval does this after every evaluation; modules would be gone
    assert backend.generate_until(requests[:1]) == alone[:1]


def test_what_cannot_be_asked_is_named(make, rows, tiny_folder):
    backend = make()
    video = [{"text": "q", "images": [SimpleNamespace()]}]
    backend.task_dict = {"toy": {"test": video}}
    request = instance(video, 0, GREEDY)
    parts = [{"type": "video", "url": "a.mp4"}]
    request.arguments = (
        "q",
        lambda row: [{"role": "user", "content": parts}],
        {},
        0,
        "toy",
        "test",
    )
    with pytest.raises(ValueError, match="toy, question 0: it has a part of the type video"):
        backend.generate_until([request])
    with pytest.raises(NotImplementedError, match="generate_until"):
        backend.loglikelihood([])
    with pytest.raises(NotImplementedError, match="single round"):
        backend.generate_until_multi_round([])
    with pytest.raises(ValueError, match="batch_size = auto"):
        make(batch_size="auto")
    with pytest.raises(ValueError, match="pretrained: give the folder"):
        EagleMixBackend()
