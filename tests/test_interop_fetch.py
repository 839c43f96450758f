"""Places: paths, Hub ids, `pretrained`. Nothing here touches the network."""

import fnmatch
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from eagle_moe.experts import resolve_expert
from eagle_moe.interop import fetch as fetching
from eagle_moe.interop.fetch import CONFIGS, fetch, is_hub_id, named_place
from eagle_moe.interop.shards import OPEN_CLIP_STEMS, STEMS
from tests.originals import spec_of


class Hub:
    """A repository that is downloaded from, and what was asked of it."""

    def __init__(self, folder: Path, *files: str) -> None:
        self.folder, self.asked = folder, []
        self.files = files

    def __call__(self, repo, revision, allow_patterns):
        self.asked.append((repo, revision, allow_patterns))
        for name in self.files:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_text("")
        return str(self.folder)


@pytest.fixture(autouse=True)
def _nothing_remembered():
    fetching._download.cache_clear()
    yield
    fetching._download.cache_clear()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    def make(*files):
        made = Hub(tmp_path / "snapshot", *files)
        monkeypatch.setattr(fetching, "snapshot_download", made)
        return made

    return make


def held(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


SPEC = spec_of("clip", 336, "openai/clip-vit-large-patch14-336")


def test_a_path_is_taken_as_it_is(tmp_path, hub):
    asked = hub().asked
    assert fetch(SPEC, tmp_path, STEMS) == tmp_path
    assert not asked


def test_pretrained_is_what_the_card_names(hub):
    made = hub("model.safetensors", "config.json", "pytorch_model.bin", "modeling.py", "vocab.json")
    folder = fetch(SPEC, "pretrained", STEMS)
    (asked,) = made.asked
    assert asked[:2] == ("openai/clip-vit-large-patch14-336", None)
    assert held(folder) == {"model.safetensors", "config.json"}


def test_a_hub_id_with_a_revision_and_shards(hub):
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    made = hub("config.json", "model.safetensors.index.json", *shards)
    folder = fetch(SPEC, "some-one/a.b@v1.2", STEMS)
    assert made.asked[0][:2] == ("some-one/a.b", "v1.2")
    assert held(folder) == {"config.json", "model.safetensors.index.json", *shards}


def test_pickles_are_fetched_only_where_there_is_nothing_better(hub):
    made = hub("config.json", "pytorch_model.bin")
    assert held(fetch(SPEC, "a/b", STEMS)) == {"config.json", "pytorch_model.bin"}
    assert len(made.asked) == 2


def test_open_clips_own_file_is_preferred_for_its_models(hub):
    hub("model.safetensors", "open_clip_model.safetensors", "open_clip_config.json")
    folder = fetch(SPEC, "laion/x", (*OPEN_CLIP_STEMS, *STEMS))
    assert held(folder) == {"open_clip_model.safetensors", "open_clip_config.json"}
    assert "open_clip_config.json" in CONFIGS


def test_one_file_of_a_repository(hub):
    hub("eva02/det/eva02_L_coco_det_sys_o365.pth", "eva02/det/other.pth")
    spec = resolve_expert("eva02")
    path = fetch(spec, "pretrained", STEMS)
    assert path.name == "eva02_L_coco_det_sys_o365.pth" and path.is_file()
    assert not path.with_name("other.pth").exists()
    with pytest.raises(ValueError, match=r"a/b: the Hub has no file gone.pth in it"):
        fetch(spec, "a/b: gone.pth", STEMS)


@pytest.mark.parametrize(
    ("spec", "place", "message"),
    [
        (SPEC, "gone/for/good", "gone/for/good: no such file or folder, nor is it a Hub id"),
        (resolve_expert("clip-tiny"), "pretrained", "its card names no checkpoint"),
        (
            spec_of("clip", 336, "https://example.org/clip.pt"),
            "pretrained",
            r"clip.pt \(`pretrained`\): no such.*download it and give the file",
        ),
        (SPEC, "a/b", r"a/b: the Hub has none of model.safetensors, pytorch_model.bin"),
    ],
)
def test_what_cannot_be_had(hub, spec, place, message):
    hub("README.md")
    with pytest.raises(ValueError, match=message):
        fetch(spec, place, STEMS)


def test_without_a_network_one_line_says_so(monkeypatch):
    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("Cannot find\nthe snapshot.")

    monkeypatch.setattr(fetching, "snapshot_download", offline)
    with pytest.raises(ValueError) as error:
        fetch(SPEC, "pretrained", STEMS)
    message = str(error.value)
    assert message.startswith("openai/clip-vit-large-patch14-336: no such path here, and it cannot")
    assert "give the folder" in message and "\n" not in message


def test_a_process_sees_one_state_of_a_repository(hub):
    made = hub("model.safetensors")
    assert fetch(SPEC, "a/b", STEMS) == fetch(SPEC, "a/b", STEMS)
    assert len(made.asked) == 1


def test_which_places_are_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    Path("here/there").touch()
    assert is_hub_id("openai/clip") and is_hub_id(resolve_expert("eva02").card.checkpoint)
    for place in ("here/there", "clip", "/a/b", "a/b/c", "./a", "random", "https://a.org/b"):
        assert not is_hub_id(place), place
    assert named_place(SPEC, "random") == "random"


def test_what_is_fetched_is_read(hub, monkeypatch):
    """From the name on a card to weights, with only the download replaced."""
    from eagle_moe.experts import build_expert
    from eagle_moe.interop.originals import find_original

    tiny = resolve_expert({"preset": "clip-tiny", "card": {"checkpoint": "me/clip"}})
    made = hub("model.safetensors")
    tensors = {k: v.contiguous() for k, v in build_expert(tiny).state_dict().items()}

    def download(*args, **kwargs):
        folder = made(*args, **kwargs)
        save_file(tensors, Path(folder, "model.safetensors"))
        return folder

    monkeypatch.setattr(fetching, "snapshot_download", download)
    original = find_original(tiny, "pretrained")
    assert [path.name for path in original.files] == ["model.safetensors"]
    read = original.read()
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)
