"""Rules for keys: nothing is dropped, doubled or invented."""

import pytest
import torch

from eagle_moe.interop.keymap import MOST_SHOWN, Rule, below, ignored, make_plan

RULES = [
    ignored(r"head\..+", "not used"),
    Rule(r"table", "position", lambda table: table[0]),
    Rule(r"blocks\.(\d+)\.(.+)", r"layers.\1.\2"),
]
SHAPES = {"table": (1, 4, 2), "blocks.0.w": (2, 2), "blocks.1.w": (2, 2), "head.w": (3,)}
EXPECTED = {"position": (4, 2), "layers.0.w": (2, 2), "layers.1.w": (2, 2)}


def plan(shapes=SHAPES, rules=RULES, expected=EXPECTED):
    return make_plan(shapes, rules, expected, "weights.pth")


def test_every_key_is_placed_or_ignored_with_a_reason():
    made = plan()
    assert {key: name for key, (name, _) in made.placed.items()} == {
        "table": "position",
        "blocks.0.w": "layers.0.w",
        "blocks.1.w": "layers.1.w",
    }
    assert made.ignored == {"head.w": "not used"}


def test_place_renames_and_changes():
    made = plan()
    table = torch.arange(8.0).view(1, 4, 2)
    name, value = made.place("table", table)
    assert name == "position" and torch.equal(value, table[0])
    assert made.place("head.w", torch.zeros(3)) is None
    name, value = made.place("blocks.1.w", torch.arange(4.0).view(2, 2).T)
    assert name == "layers.1.w" and value.is_contiguous()


def test_the_first_rule_that_matches_the_whole_key_counts():
    rules = [ignored(r"blocks\.0", "only a part of the key"), *RULES, Rule(r".+", "position")]
    assert plan(rules=rules).placed["blocks.0.w"][0] == "layers.0.w"
    assert set(
        plan(rules=[ignored(r"blocks\..+", "all"), *RULES], expected={"position": (4, 2)}).ignored
    ) == {
        "blocks.0.w",
        "blocks.1.w",
        "head.w",
    }


def test_below_moves_rules_one_level_down():
    (rule,) = below([Rule(r"(\w)\.w", r"x.\1")], "a.b.", "tower.")
    shapes = {"a.b.c.w": (1,)}
    assert plan(shapes, [rule], {"tower.x.c": (1,)}).placed["a.b.c.w"][0] == "tower.x.c"
    with pytest.raises(ValueError, match="unknown keys: aXb.c.w"):  # the prefix is plain text
        plan({"aXb.c.w": (1,)}, [rule], {})
    (rule,) = below([ignored(r"w", "why")], "a.", "tower.")
    assert plan({"a.w": (1,)}, [rule], {}).ignored == {"a.w": "why"}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"odd": (7,)}, r"unknown keys: odd \[7\]\."),
        (
            {"blocks.2.w": (2, 2)},
            r"without a place in the model: blocks.2.w \(would be layers.2.w\)",
        ),
        ({"blocks.1.w": (2, 3)}, r"wrong shapes: blocks.1.w \[2, 3\], expected \[2, 2\]\."),
        ({"table": (4, 2)}, r"wrong shapes: table \[2\], expected \[4, 2\]\."),
        ({"table": ()}, r"wrong shapes: table \[\], expected \[4, 2\]\."),
        ({"blocks.1.w": None}, r"nothing in the file for: layers.1.w\."),
    ],
)
def test_faults(change, fault):
    shapes = {key: shape for key, shape in {**SHAPES, **change}.items() if shape is not None}
    with pytest.raises(ValueError, match=rf"^weights.pth: .*{fault}"):
        plan(shapes)


def test_two_keys_for_one_tensor():
    rules = [*RULES, Rule(r"again\.w", "layers.0.w")]
    with pytest.raises(ValueError, match=r"two keys for one tensor: again.w and blocks.0.w"):
        plan({**SHAPES, "again.w": (2, 2)}, rules)


def test_all_faults_are_told_at_once_and_long_lists_are_cut():
    shapes = {f"odd.{i}": (1,) for i in range(MOST_SHOWN + 5)}
    with pytest.raises(ValueError) as error:
        plan(shapes)
    message = str(error.value)
    assert "and 5 more.\nnothing in the file for: position, layers.0.w, layers.1.w." in message
