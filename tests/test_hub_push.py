"""eagle_moe/hub/push.py, against a Hub on the loopback: what arrives, is sent again, or fails."""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path

import huggingface_hub.utils._http as hub_http
import pytest
import torch
from huggingface_hub import HfApi

from eagle_moe.build import load_model
from eagle_moe.checkpoint import PartRecord, write_provenance
from eagle_moe.hub.push import changed_files, download_release, local_files, push_release
from tests.loopback_answers import LARGE
from tests.loopback_hub import OWNER, READER, LoopbackHub

REPO = "me/model"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """Between its own attempts the library waits for seconds."""
    real = time.sleep
    monkeypatch.setattr(hub_http.time, "sleep", lambda seconds: real(min(seconds, 0.01)))


def make_folder(folder: Path, shards: int = 3) -> Path:
    """Like a release: small files, one below a folder, and large ones."""
    folder.mkdir()
    record = PartRecord(sha256="0", parameters=1, history=["random"])
    write_provenance(folder, {"language_model": record})
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (folder / "scores").mkdir()
    (folder / "scores" / "card.json").write_text("{}")
    for index in range(shards):
        (folder / f"model-{index}.safetensors").write_bytes(bytes([index]) * (5 * LARGE))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_folder(tmp_path / "release")


def push(folder, api, **options):
    return push_release(folder, REPO, api=api, **{"private": True, **options})


def content(folder) -> dict[str, bytes]:
    return {name: file.path.read_bytes() for name, file in local_files(folder).items()}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_commit_holds_what_the_folder_holds(hub, api, folder):
    lines: list[str] = []
    pushed = push(folder, api, tag="v1", say=lines.append)
    there = hub.files(REPO, pushed.revision)
    assert {k: v for k, v in there.items() if k != ".gitattributes"} == content(folder)
    assert hub.repos[REPO].private
    assert hub.repos[REPO].tags == {"v1": pushed.revision}
    assert (sorted(pushed.uploaded), pushed.skipped) == (sorted(content(folder)), [])
    assert pushed.url == f"{hub.url}/{REPO}/tree/{pushed.revision}"
    assert "made, private" in lines[0] and "6 of 6 files" in lines[1]


def test_a_second_push_sends_nothing_and_makes_no_commit(hub, api, folder):
    first = push(folder, api)
    hub.received.clear()
    second = push(folder, api)
    assert second.revision == first.revision
    assert (second.uploaded, sorted(second.skipped)) == ([], sorted(content(folder)))
    assert not hub.received and len(hub.repos[REPO].commits) == 2


def test_only_what_changed_is_sent_and_what_is_gone_is_gone(hub, api, folder):
    first = push(folder, api)
    hub.received.clear()
    (folder / "model-1.safetensors").write_bytes(b"new" * LARGE)
    (folder / "scores" / "card.json").write_text('{"a": 1}')
    (folder / "model-2.safetensors").unlink()
    assert changed_files(folder, REPO, api=api) == ["model-1.safetensors", "scores/card.json"]
    second = push(folder, api)
    assert second.uploaded == ["model-1.safetensors", "scores/card.json"]
    assert second.deleted == ["model-2.safetensors"]
    assert dict(hub.received) == {
        sha256(folder / "model-1.safetensors"): 3 * LARGE,
        "scores/card.json": 8,
    }
    assert "model-2.safetensors" not in hub.files(REPO)
    assert "model-2.safetensors" in hub.files(REPO, first.revision)


def test_a_connection_that_drops_once_is_survived(hub, api, folder):
    hub.drop_after = 2 * LARGE
    pushed = push(folder, api)
    assert hub.drop_after is None
    assert set(content(folder)) < set(hub.files(REPO, pushed.revision))
    assert sum(hub.received[sha256(p)] for p in folder.glob("*.safetensors")) < 18 * LARGE


def test_an_upload_that_broke_off_goes_on_with_what_is_missing(hub, api, folder):
    """The last shard never comes through in the first run, and the run ends."""
    last = sha256(folder / "model-2.safetensors")
    hub.broken = {last}
    with pytest.raises(ValueError, match=r"^me/model: uploading: the connection was lost") as error:
        push(folder, api)
    assert "Run the same command again" in str(error.value)
    assert "\n" not in str(error.value)
    assert sha256(folder / "model-0.safetensors") in hub.large and last not in hub.large
    assert set(hub.files(REPO)) == {".gitattributes"}  # no half of a release is ever seen

    hub.broken.clear()
    hub.received.clear()
    pushed = push(folder, api)
    sent = {key: size for key, size in hub.received.items() if len(key) == 64}
    assert sent == {last: 5 * LARGE}
    assert set(content(folder)) < set(hub.files(REPO, pushed.revision))


def test_a_branch_and_a_tag_of_their_own(hub, api, folder):
    push(folder, api)
    (folder / "README.md").write_text("# another")
    pushed = push(folder, api, revision="trial", tag="t1")
    assert hub.repos[REPO].branches["trial"] == hub.repos[REPO].tags["t1"] == pushed.revision
    assert hub.files(REPO)["README.md"] != hub.files(REPO, "trial")["README.md"]
    with pytest.raises(ValueError, match=r"the tag t1 exists and names another commit"):
        push(make_folder(folder.parent / "other", 1), api, tag="t1")
    assert push(folder, api, revision="trial", tag="t1").uploaded == []


def test_a_download_into_an_empty_cache_is_the_commit_byte_for_byte(hub, api, folder, tmp_path):
    first = push(folder, api)
    before = content(folder)
    (folder / "README.md").write_text("# another")
    push(folder, api)
    found = download_release(REPO, first.revision, tmp_path / "cache", api=api)
    assert {k: v for k, v in content(found).items() if k != ".gitattributes"} == before


def test_a_pushed_model_answers_as_before(hub, api, tiny_folder, tiny_model, tmp_path):
    release = tmp_path / "release"
    shutil.copytree(tiny_folder, release)
    pushed = push(release, api)
    model = load_model(download_release(REPO, pushed.revision, tmp_path / "cache", api=api))
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, tiny_model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("token", "repo", "told"),
    [
        (None, REPO, "no token for the Hub"),
        ("hf_expired", REPO, "the Hub does not take the token"),
        (READER, REPO, r"the token may not do that .* write access to me"),
        (OWNER, "other/model", r"the token may not do that .* write access to other"),
        (OWNER, "no name", "no name of a repository: write OWNER/NAME"),
    ],
)
def test_who_may_not_push_is_told_why(hub, folder, token, repo, told, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    api = HfApi(endpoint=hub.url, token=token)
    with pytest.raises(ValueError, match=told) as error:
        push_release(folder, repo, private=True, api=api)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{repo}: ")
    assert not hub.repos


def test_a_name_that_is_taken_by_something_else(hub, api, folder, tmp_path):
    push(folder, api)
    hub.repos[REPO].commit("main", hub.repos[REPO].commits[next(iter(hub.repos[REPO].commits))])
    push(folder, api)  # nothing but the Hub's own file is in it
    files = dict(hub.repos[REPO].commits[hub.repos[REPO].branches["main"]])
    del files["provenance.json"]
    hub.repos[REPO].commit("main", files)
    with pytest.raises(ValueError, match=r"the name is taken: it holds 6 files and is no release"):
        push(folder, api)


def test_a_name_that_is_taken_by_what_may_not_be_seen(hub, api, folder):
    push(folder, api)
    hub.repos[REPO].hidden = True
    with pytest.raises(
        ValueError, match=r"the name is taken, by something that this token may not"
    ):
        push(folder, api)


def test_nothing_meant_to_be_private_goes_where_everybody_reads(hub, api, folder):
    push(folder, api, private=False)
    assert not hub.repos[REPO].private
    with pytest.raises(ValueError, match=r"exists and is public. Add --public"):
        push(folder, api)
    hub.repos[REPO].private = True
    with pytest.raises(ValueError, match=r"exists and is private. Make it public"):
        push(folder, api, private=False)


def test_no_room_on_the_hub_or_here_is_told(hub, api, folder, tmp_path, monkeypatch):
    hub.full = True
    with pytest.raises(ValueError, match=r"uploading: the Hub has no room left for it"):
        push(folder, api)
    hub.full = False
    pushed = push(folder, api)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("eagle_moe.hub.push.snapshot_download", full)
    with pytest.raises(ValueError, match=r"downloading: the disk is full .* Free space"):
        download_release(REPO, pushed.revision, tmp_path / "cache", api=api)


@pytest.mark.parametrize(
    ("repo", "revision", "told"),
    [
        ("me/other", "main", "the Hub has no such repository"),
        (REPO, "0" * 40, "no such branch, tag or commit in it"),
    ],
)
def test_what_is_not_there_to_download(hub, api, folder, tmp_path, repo, revision, told):
    push(folder, api)
    with pytest.raises(ValueError, match=told):
        download_release(repo, revision, tmp_path / "cache", api=api)


def test_a_hub_that_is_not_there(folder, tmp_path):
    with LoopbackHub() as gone:
        url = gone.url
    with pytest.raises(ValueError, match=r"uploading: the connection was lost"):
        push(folder, HfApi(endpoint=url, token=OWNER))


def test_a_bad_card_is_refused_by_the_hub_before_anything_is_sent(hub, api, folder):
    (folder / "README.md").write_text("---\nlicense: my own\n---\n")
    with pytest.raises(ValueError, match="license"):
        push(folder, api)
    assert not hub.received


def test_somebody_elses_commit_meanwhile_is_not_run_over(hub, api, folder, monkeypatch):
    from eagle_moe.hub import push as pushing

    real = pushing._check_tag

    def meanwhile(*arguments):
        real(*arguments)
        hub.repos[REPO].commit("main", {})

    monkeypatch.setattr(pushing, "_check_tag", meanwhile)
    with pytest.raises(ValueError, match=r"somebody changed the repository meanwhile"):
        push(folder, api)


def test_a_folder_that_changes_during_the_upload_is_noticed(hub, api, folder, monkeypatch):
    from eagle_moe.hub import push as pushing

    real = pushing._commit

    def changing(*arguments):
        commit = real(*arguments)
        (folder / "late.txt").write_text("x")
        files = dict(hub.repos[REPO].commits[commit])
        files["stray"] = files.pop("scores/card.json")
        return hub.repos[REPO].commit("main", files)

    monkeypatch.setattr(pushing, "_commit", changing)
    with pytest.raises(
        ValueError, match=r"does not hold what the folder does: scores/card.json, stray"
    ):
        push(folder, api)


def test_an_empty_folder_is_refused(hub, api, tmp_path):
    with pytest.raises(ValueError, match="nothing in it to upload"):
        push(tmp_path, api)
