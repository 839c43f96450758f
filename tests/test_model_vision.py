"""Canvas -> maps -> image tokens."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import make_config, make_model
from tests.model_inputs import TINY, TOKENS, canvases


@torch.no_grad()
def test_image_features(tiny_model):
    features = tiny_model.get_image_features(canvases(3))
    assert features.last_hidden_state.shape == (3, TOKENS, 192)
    assert [tuple(tokens.shape) for tokens in features.pooler_output] == [(TOKENS, 32)] * 3
    assert isinstance(tiny_model.get_image_features(canvases(1), return_dict=False), tuple)


def test_wrong_canvas_names_both_shapes(tiny_model):
    with pytest.raises(ValueError, match=r"\(num_images, 3, 64, 64\), got \(1, 3, 32, 32\)"):
        tiny_model.get_image_features(canvases(1)[..., :32, :32])


@torch.no_grad()
def test_maps_do_not_depend_on_batch_neighbours():
    vision = make_model(make_config(TINY)).model.vision_tower
    together = vision.encode(canvases(3))
    for i, pixels in enumerate(canvases(3).split(1)):
        for name, alone in vision.encode(pixels).items():
            torch.testing.assert_close(together[name][i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_order_of_experts_is_part_of_the_model(tiny_model):
    assert list(tiny_model.model.vision_tower.towers) == ["clip", "convnext"]
    swapped = make_config(("convnext-tiny", "clip-tiny"))
    assert [spec.name for spec in swapped.vision_config.expert_specs] == ["convnext", "clip"]


class Syncs(TorchDispatchMode):
    """Collects the operations whose result or shape the host would have to wait for."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.split("::")[-1].startswith(self.WAITING):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_nothing_waits_for_the_host_between_canvas_and_image_tokens():
    model = make_model(make_config(TINY))
    with Syncs() as syncs:
        model.get_image_features(canvases(2))
    assert syncs.seen == []
    with Syncs() as syncs:
        torch.ones(1).item()
    assert syncs.seen  # the counter does see one


@torch.no_grad()
def test_image_features_compile_as_one_graph(tiny_model):
    model = tiny_model
    compiled = torch.compile(model.get_image_features, fullgraph=True, backend="eager")
    actual, expected = compiled(canvases(1)), model.get_image_features(canvases(1))
    torch.testing.assert_close(actual.pooler_output[0], expected.pooler_output[0])
