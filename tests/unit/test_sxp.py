# SPDX-License-Identifier: LGPL-2.1-or-later
"""S-expressions: xend's reading and writing, places of errors, limits, and the functions that scripts call."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from remus_colo import sxp
from remus_colo.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", None),
        ("  # nothing\n", None),
        ("receive\n", ["receive"]),
        ("(a b) (c)", [["a", "b"], ["c"]]),
        ("()", [[]]),
        ("(a (b (c ())))", [["a", ["b", ["c", []]]]]),
        ("(port\t8002\r\n)", [["port", "8002"]]),
        ("(a 'b c' \"d e\")", [["a", "b c", "d e"]]),
        ("('' \"\")", [["", ""]]),
        ("('it\"s' \"it's\")", [['it"s', "it's"]]),
        (r"('\a\b\t\n\v\f\r\\\'\"')", [["\a\b\t\n\v\f\r\\'\""]]),
        (r"('\x41\101\7')", [["AA\a"]]),
        (r"('\1019')", [["A9"]]),
        (r"('\xc3\xa9')", [["é"]]),
        ("('é' xé)", [["é", "xé"]]),
        (r"('\xff')", [["\udcff"]]),
        ("(a#b)\nc)", [["a", "c"]]),
        ("('# no comment')", [["# no comment"]]),
        # a quote within an atom is a part of it, one that begins a text ends the one before
        ("(ab'c d\"e 'x'y)", [["ab'c", 'd"e', "x", "y"]]),
        # brackets and semicolons end an atom and begin one
        ("{a} <b>;c", ["{a", "}", "<b", ">", ";c"]),
        ("(@ !x $y &z)", [["@", "!x", "$y", "&z"]]),
        ("a \x04 (not read", ["a"]),
    ],
)
def test_reading(text: str, values: list[Any] | None) -> None:
    assert sxp.all_from_string(text) == values


def test_a_needless_backslash_is_read_as_xend_did_and_told() -> None:
    parser = sxp.Parser()
    parser.input("(hosts\n '^a\\.b$')")
    assert parser.get_val() == ["hosts", "^a\\b$"]
    (note,) = parser.notes
    assert (note.line, note.column) == (2, 6)
    assert "\\\\." in note.text


@pytest.mark.parametrize(
    ("text", "line", "column", "said"),
    [
        ("(a\n (b c)\n", 1, 1, "this list is not closed"),
        ("(a\n (b c\n", 2, 2, "this list is not closed"),
        ("(a)\n )", 2, 2, ") without a ("),
        ("(xé 'x')\n(b 'é\n", 2, 4, "this string is not closed"),
        ("'a\\", 1, 1, "this string is not closed"),
        ("('é\\400')", 1, 7, "\\400 is more than \\377"),
        ("('\\x4')", 1, 6, "\\x needs two digits"),
        ("ab \x01", 1, 4, "code 1"),
        ("é", 1, 1, "code 195"),
    ],
)
def test_errors_have_a_place(text: str, line: int, column: int, said: str) -> None:
    with pytest.raises(sxp.ParseError) as caught:
        sxp.all_from_string(text)
    error = caught.value
    assert isinstance(error, ConfigError)
    assert (error.line, error.column) == (line, column), str(error)
    assert said in error.value
    assert str(error) == f"line {line} column {column}: {error.value}"


def test_an_error_stays() -> None:
    parser = sxp.Parser()
    with pytest.raises(sxp.ParseError):
        parser.input("(a) )")
    assert parser.has_error()
    assert parser.get_val() == ["a"]
    with pytest.raises(sxp.ParseError):
        parser.input("(b)")
    parser.reset()
    parser.input("(b)")
    assert parser.get_val() == ["b"]


def test_depth_is_bounded() -> None:
    parser = sxp.Parser(max_depth=3)
    parser.input("(((a)))")
    with pytest.raises(sxp.ParseError, match="more than 3 lists within each other"):
        parser.input("((((")
    with pytest.raises(sxp.ParseError):
        sxp.all_from_string("(" * 1_000_000)


@pytest.mark.parametrize("begin", ["", "(", "'", "(a '", "(a #"])
def test_size_is_bounded_per_expression(begin: str) -> None:
    parser = sxp.Parser(limit_bytes=100)
    for _ in range(10):
        parser.input("(a b c d e f g h i j k l m n)\n# comments in between do not count\n")
    with pytest.raises(sxp.ParseError, match="an expression of more than 100 bytes"):
        parser.input(begin + "x" * 101)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([], "()"),
        (["a", ["b", []], ("c",)], "(a (b ()) (c))"),
        ([1, 2.5, 10**20], "(1 2.5 100000000000000000000)"),
        (["00:16:3e:00:00:01", "/dev/sda1", "a_b-c.d~e"], "(00:16:3e:00:00:01 /dev/sda1 a_b-c.d~e)"),
        (["@", "@a", ""], "(@ '@a' '')"),
        (["a b", "it's", "'\"", "\n\t\r\x00\x7f"], "('a b' \"it's\" '\\'\"' '\\n\\t\\r\\x00\\x7f')"),
        (["é", "²", b"\xff", "\udcff"], r"('\xc3\xa9' '\xc2\xb2' '\xff' '\xff')"),
        ([None, True], "('None' True)"),
        ("=", "'='"),
    ],
)
def test_writing(value: Any, text: str) -> None:
    assert sxp.to_string(value) == text


def test_half_a_surrogate_pair_stands_for_no_octet() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        sxp.to_string(["\ud800"])


def test_what_xend_wrote_is_written_again() -> None:
    text = (EXAMPLES / "domain.sxp").read_text().rstrip("\n")
    domain = sxp.from_string(text)
    assert sxp.to_string(domain) == text
    assert sxp.child_value(domain, "description") == 'café\tserver, Bob\'s "main" one'
    assert sxp.child_value(domain, "cpus") == [[]]
    macs = [sxp.child_value(device[1], "mac") for device in sxp.children(domain, "device")]
    assert macs == ["00:16:3e:77:00:10", None, None]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.sxp")), ids=lambda path: path.name)
def test_examples_go_round(path: Path) -> None:
    with open(path, "rb") as file:
        values = sxp.parse(file)
    assert values
    assert [sxp.from_string(sxp.to_string(value)) for value in values] == values


def test_show_writes_to_what_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    sxp.show(["a", "b c"], out)
    sxp.show(["d"])
    assert (out.getvalue(), capsys.readouterr().out) == ("(a 'b c')", "(d)")
    sxp.show_xml(["a", ["@", ["k", "v"]], "b", ["c"]], out)
    assert out.getvalue().removeprefix("(a 'b c')") == "<a k=v>b <c></c></a>"


TREE = sxp.from_string(
    "(domain (@ (id d1) (x y)) (name web) (device (vif (@ (id v0)) (mac m0))) (device (vbd)) flag)"
)


def test_elements_of_a_tree() -> None:
    assert sxp.name(TREE) == "domain"
    assert (sxp.name("atom"), sxp.name([]), sxp.name(None)) == ("atom", None, None)
    assert (sxp.elementp(TREE), sxp.elementp(TREE, "domain"), sxp.elementp(TREE, "d")) == (True, True, False)
    assert (sxp.elementp([]), sxp.elementp("a")) == (False, False)
    assert sxp.attributes(TREE) == [["id", "d1"], ["x", "y"]]
    assert (sxp.attribute(TREE, "x"), sxp.attribute(TREE, "z", 1)) == ("y", 1)
    assert len(sxp.children(TREE)) == 4
    assert len(sxp.children(TREE, "device")) == 2
    assert sxp.children("atom") == sxp.children([]) == []
    assert sxp.child(TREE, "name") == ["name", "web"]
    assert sxp.child(TREE, "none", "d") == "d"
    assert (sxp.child_value(TREE, "name"), sxp.child_value(TREE, "none", 5)) == ("web", 5)
    assert sxp.child_value(["a", ["b"]], "b", 5) == 5
    assert sxp.child_at(TREE, 3) == sxp.child3(TREE) == "flag"
    assert (sxp.child0(TREE), sxp.child4(TREE, 0)) == (["name", "web"], 0)
    assert sxp.has_id(TREE, "d1") and not sxp.has_id(TREE, "v0")
    assert sxp.with_id([TREE], "v0") == sxp.child0(sxp.child1(TREE))
    assert sxp.child_with_id([TREE], "v0") is None
    assert sxp.child_with_id([["a"], TREE], "d1") is TREE
    assert [sxp.name(element) for element, _ in sxp.elements(TREE)] == [
        *("domain", "name", "device", "vif", "mac", "device", "vbd"),
    ]
    vif = next(context for element, context in sxp.elements(TREE) if element[0] == "vif")
    assert (vif[0], vif[1], vif[2][0]) == (0, ["device", sxp.child0(vif[1])], 1)


def test_merge() -> None:
    first = sxp.from_string("(d (a 1) (v (x 1)) one)")
    second = sxp.from_string("(d (b 2) (v (x 2) (y 2)) (v (z 3)) two)")
    assert sxp.merge(first, second) == [
        *("d", ["a", "1"], ["v", ["x", "1"], ["y", "2"]], ["v", ["z", "3"]], ["b", "2"], "one"),
    ]
    assert (sxp.merge(None, first), sxp.merge(first, None), sxp.merge("a", "b")) == (first, first, "a")


def test_deep_nesting_is_written_and_refused_but_crashes_nothing() -> None:
    deep: Any = "core"
    for _ in range(100_000):
        deep = [deep]
    text = sxp.to_string(deep)
    assert text == "(" * 100_000 + "core" + ")" * 100_000
    with pytest.raises(
        sxp.ParseError, match=rf"line 1 column {sxp.MAX_DEPTH + 1}: more than {sxp.MAX_DEPTH} lists"
    ):
        sxp.from_string(text)
    fits = "(" * sxp.MAX_DEPTH + ")" * sxp.MAX_DEPTH
    assert sxp.to_string(sxp.from_string(fits)) == fits


def test_a_huge_expression() -> None:
    values = [["vif", ["mac", f"00:16:3e:00:00:{number % 256:02x}"]] for number in range(100_000)]
    assert sxp.from_string(sxp.to_string(values)) == values


@pytest.mark.parametrize("text", ["\ufeff(a b)\r\n(c)\r\n", b"\xef\xbb\xbf(a b)\r\n(c)\r\n"])
def test_what_windows_editors_leave_in_a_file(text: str | bytes) -> None:
    expected = [["a", "b"], ["c"]]
    assert sxp.all_from_string(text) == expected
    assert sxp.parse(io.StringIO(text) if isinstance(text, str) else io.BytesIO(text)) == expected
    assert sxp.parse(io.BytesIO(b"\xef\xbb\xbf")) is None
