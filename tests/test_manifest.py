"""Manifest: known by content, read strictly, written whole."""

import json

import pytest

from train.data.manifest import BadSample, FileReport, Manifest, Overlap, fingerprint_of


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("{}\n")
    return path


def manifest_of(data):
    bad = BadSample(index=3, id="é", fault="image", reason="no such image file")
    report = FileReport(
        path="elsewhere/train.jsonl",
        fingerprint=fingerprint_of(data),
        image_root=".",
        records=7,
        bad=[bad],
        counts={"images": 6, "tokens": {"mean": 1.5}},
    )
    shared = Overlap(first="a", second="b", images=1, samples=0, examples=[("x", "y")])
    return Manifest(files=[report], overlaps=[shared])


def test_round_trip(data, tmp_path):
    path = tmp_path / "new" / "manifest.json"
    manifest_of(data).save(path)
    assert Manifest.load(path) == manifest_of(data)
    assert [file.name for file in path.parent.iterdir()] == ["manifest.json"]


def test_a_file_is_known_by_its_content(data, tmp_path):
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(data.read_bytes())
    assert manifest_of(data).report_on(fingerprint_of(moved), str(moved), "m.json").records == 7
    moved.write_text("{} \n")
    with pytest.raises(ValueError, match=r"m\.json: it does not describe .*moved\.jsonl as it is"):
        manifest_of(data).report_on(fingerprint_of(moved), str(moved), "m.json")


def test_what_is_no_manifest_is_refused(data, tmp_path):
    path = tmp_path / "manifest.json"
    with pytest.raises(FileNotFoundError, match=r"no such manifest.*--out"):
        Manifest.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Manifest.load(path)
    path.write_text(json.dumps({**manifest_of(data).dump(), "version": 2}))
    with pytest.raises(ValueError, match="`version` = 2"):
        Manifest.load(path)
    path.write_text(json.dumps({"file": []}))
    with pytest.raises(ValueError, match='Did you mean "files"'):
        Manifest.load(path)
