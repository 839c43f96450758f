from __future__ import annotations

import pytest

from eagle_moe.schema import Schema, apply_overrides, load_yaml, nearest, read_yaml


class Inner(Schema):
    rate: float = 1.0


class Outer(Schema):
    name: str
    inner: Inner = Inner()
    parts: dict[str, Inner] = {}
    layers: list[Inner] = []
    maybe: Inner | None = None


def test_round_trip():
    outer = Outer.parse({"name": "a", "parts": {"x": {"rate": 2}}, "layers": [{}]}, "file")
    assert Outer.parse(outer.dump(), "again") == outer


def test_objects_are_frozen():
    with pytest.raises(Exception, match="frozen"):
        Outer(name="a").name = "b"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"file: `name` is required"),
        ({"name": "a", "nmae": 1}, r'file: unknown key `nmae`\. Did you mean "name"\?'),
        ({"name": "a", "inner": {"rte": 1}}, r'unknown key `inner\.rte`\. Did you mean "rate"\?'),
        ({"name": "a", "parts": {"x": {"rte": 1}}}, r'`parts\.x\.rte`\. Did you mean "rate"'),
        ({"name": "a", "layers": [{"rte": 1}]}, r'`layers\.0\.rte`\. Did you mean "rate"'),
        ({"name": "a", "maybe": {"rte": 1}}, r'`maybe\.rte`\. Did you mean "rate"'),
        ({"name": "a", "inner": {"rate": "fast"}}, r"`inner\.rate` = 'fast'"),
    ],
)
def test_errors_name_source_field_value_and_remedy(data, message):
    with pytest.raises(ValueError, match=message):
        Outer.parse(data, "file")


def test_every_error_is_reported_at_once():
    with pytest.raises(ValueError, match=r"(?s)`nmae`.*`inner\.rate`|`inner\.rate`.*`nmae`"):
        Outer.parse({"name": "a", "nmae": 1, "inner": {"rate": "x"}}, "file")


def test_nearest_lists_all_and_guesses_only_what_is_close():
    assert nearest("clpi", ["sam", "clip"]) == ' Did you mean "clip"? Valid: clip, sam.'
    assert nearest("zzz", ["sam"]) == " Valid: sam."
    assert nearest("zzz", []) == " Valid: (none)."


def test_many_names_are_not_all_listed():
    names = [f"option_{number:02d}" for number in range(40)] + ["max_steps"]
    told = nearest("max_step", names)
    assert told.startswith(' Did you mean "max_steps"? Valid: max_steps')
    assert told.endswith("more.")
    assert len(told) < 200
    assert nearest("zzz", names).count("option_") == 40


def test_yaml_numbers_in_scientific_notation():
    data = read_yaml("a: 1e-3\nb: 2E5\nc: 1.5e+2\nd: .5e1\ne: e5\nf: 1e", "text")
    assert data == {"a": 0.001, "b": 2e5, "c": 150.0, "d": 5.0, "e": "e5", "f": "1e"}


def test_yaml_errors_name_the_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: [1")
    with pytest.raises(ValueError, match=r"a\.yaml: not valid YAML"):
        load_yaml(path)
    path.write_text("- 1")
    with pytest.raises(ValueError, match=r"a\.yaml: expected a mapping at the top, got list"):
        load_yaml(path)
    with pytest.raises(FileNotFoundError, match=r"b\.yaml: no such file"):
        load_yaml(tmp_path / "b.yaml")


def test_yaml_makes_no_objects():
    with pytest.raises(ValueError, match="not valid YAML"):
        read_yaml("!!python/object/apply:os.getcwd []", "text")


def test_overrides_reach_mappings_and_lists():
    data = {"a": {"b": 1}, "c": [{"d": 1}, 2]}
    changed = apply_overrides(data, ["a.b=2", "c.0.d=1e-3", "c.1=[x, y]", "e.f=null", "a.g=text"])
    assert changed == {
        "a": {"b": 2, "g": "text"},
        "c": [{"d": 0.001}, ["x", "y"]],
        "e": {"f": None},
    }
    assert data == {"a": {"b": 1}, "c": [{"d": 1}, 2]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a", "write it as key=value"),
        ("=1", "write it as key=value"),
        ("a.b.c=1", "`b` lies below a plain value|`a.b` has no keys"),
        ("c.5=1", "`5` is not an index of a list of 2"),
        ("c.x=1", "`x` is not an index"),
        ("a=[1", "not valid YAML"),
    ],
)
def test_wrong_overrides_are_explained(override, message):
    with pytest.raises(ValueError, match=message):
        apply_overrides({"a": {"b": 1}, "c": [1, 2]}, [override])
