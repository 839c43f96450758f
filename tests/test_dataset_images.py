"""Images of a dataset: any colour mode is read, and a bad file is never papered over."""

import zlib

import pytest
import torch

from tests.small_data import SIZE, make_data, spec
from train.data import ConversationDataset
from train.data.manifest import BadSample, FileReport, Manifest, fingerprint_of

BAD = BadSample(index=1, id="b", fault="image", reason='record 1 (id "b"): 1.png: is empty.')


@pytest.fixture
def data(tmp_path, make_image):
    return make_data(tmp_path, make_image)


def write_manifest(path, *bad, out="manifest.json"):
    report = FileReport(
        path=str(path),
        fingerprint=fingerprint_of(path),
        image_root=str(path.parent),
        records=4,
        bad=list(bad),
        counts={},
    )
    Manifest(files=[report]).save(path.parent / out)
    return str(path.parent / out)


def spoil(path, how, make_image):
    """Turn a good file into one that must be refused."""
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif how == "animated":
        frames = [make_image(seed=n) for n in range(3)]
        frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])
    elif how == "not an image":
        path.write_text("<html>404</html>")
    elif how == "huge":
        header = bytearray(path.read_bytes())
        header[16:24] = (200_000).to_bytes(4, "big") * 2  # width and height of a PNG's header
        header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
        path.write_bytes(header)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "no such image file"),
        ("empty", "is empty"),
        ("truncated", "damaged or incomplete"),
        ("animated", "has 3 frames"),
        ("not an image", "not an image"),
        ("huge", "pixels"),
    ],
)
def test_a_bad_image_stops_the_run_and_is_named(data, tiny_processor, make_image, how, reason):
    dataset = ConversationDataset(spec(data), tiny_processor, 512)
    spoil(data.parent / "images/3.png", how, make_image)
    with pytest.raises(ValueError, match=reason) as error:
        dataset[3]
    message = str(error.value)
    assert 'record 3 (id "d")' in message
    assert "3.png" in message
    assert "on_bad_image: skip" in message


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_other_colour_modes_are_converted(data, tiny_processor, make_image, mode):
    image = make_image(seed=1)
    path = data.parent / "images/3.png"
    if mode == "CMYK":
        image.convert(mode).save(path, format="TIFF")
    else:
        image.convert("L" if mode == "I;16" else mode).convert(mode).save(path, format="PNG")
    (canvas,) = ConversationDataset(spec(data), tiny_processor, 512)[3]["pixel_values"]
    assert canvas.shape == (3, SIZE, SIZE)
    assert canvas.dtype == torch.uint8


def test_skip_leaves_out_and_counts_what_the_manifest_names(data, tiny_processor):
    manifest = write_manifest(data, BAD)
    dataset = ConversationDataset(
        spec(data, on_bad_image="skip", manifest=manifest), tiny_processor, 512
    )
    assert [dataset.record(n).id for n in range(len(dataset))] == ["a", "c", "d"]
    assert dataset.counts()["skipped"] == 1
    assert dataset.counts()["records"] == 3


def test_fail_refuses_before_step_one(data, tiny_processor):
    manifest = write_manifest(data, BAD)
    with pytest.raises(ValueError, match=r'1 bad images.*record 1 \(id "b"\).*is empty'):
        ConversationDataset(spec(data, manifest=manifest), tiny_processor, 512)


def test_only_bad_images_are_skipped(data, tiny_processor):
    other = BAD.model_copy(update={"fault": "unsupervised"})
    manifest = write_manifest(data, other)
    dataset = ConversationDataset(spec(data, manifest=manifest), tiny_processor, 512)
    assert len(dataset) == 4


def test_skip_without_a_manifest_says_how_to_get_one(data, tiny_processor):
    with pytest.raises(ValueError, match=r"needs a `manifest`.*train\.data\.doctor"):
        ConversationDataset(spec(data, on_bad_image="skip"), tiny_processor, 512)


def test_a_manifest_of_other_data_is_refused(data, tiny_processor):
    manifest = write_manifest(data, BAD)
    data.write_text(data.read_text() + "\n" + data.read_text().splitlines()[0])
    with pytest.raises(ValueError, match="does not describe .* as it is now"):
        ConversationDataset(spec(data, on_bad_image="skip", manifest=manifest), tiny_processor, 512)


def test_a_picture_that_broke_after_the_examination_is_never_substituted(
    data, tiny_processor, make_image
):
    manifest = write_manifest(data, BAD)
    dataset = ConversationDataset(
        spec(data, on_bad_image="skip", manifest=manifest), tiny_processor, 512
    )
    spoil(data.parent / "images/0.png", "truncated", make_image)
    with pytest.raises(ValueError, match='id "a"'):
        dataset[0]


def test_nothing_left(data, tiny_processor):
    bad = [BAD.model_copy(update={"index": n}) for n in range(4)]
    manifest = write_manifest(data, *bad)
    with pytest.raises(ValueError, match="no sample is left"):
        ConversationDataset(spec(data, on_bad_image="skip", manifest=manifest), tiny_processor, 512)
