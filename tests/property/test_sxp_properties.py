# SPDX-License-Identifier: LGPL-2.1-or-later
"""Properties of S-expressions: they go round, the split never matters, and no input does more than be refused."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from remus_colo import config, sxp
from remus_colo.config_keys import COLO_KEYS, GROUP, XEND_KEYS
from remus_colo.errors import ConfigError

# everything that a string can hold but half a surrogate pair, with what the format gives a meaning to made likely
texts = st.text(alphabet="ab7\\'\"()#{};@ \t\n\x00\x04\x7fé€😀", max_size=8) | st.text(max_size=8)
expressions: st.SearchStrategy[Any] = st.recursive(
    texts, lambda inner: st.lists(inner, max_size=4), max_leaves=20
)
# octets of which a good part is close to being an expression
near = st.lists(
    st.sampled_from(
        [b"(", b")", b"'", b'"', b"\\", b"x4", b"\\x41", b"\\777", b"#", b"\n", b" ", b"a", b"\xc3", b"\x04"]
    )
    | st.binary(max_size=3),
    max_size=25,
).map(b"".join)


def read(parser: sxp.Parser, pieces: list[bytes]) -> tuple[list[Any], str | None, Any]:
    """What the pieces gave, the complaint at the end, and the notes."""
    try:
        for piece in pieces:
            parser.input(piece)
        parser.input_eof()
    except sxp.ParseError as error:
        return parser.get_all(), str(error), parser.notes
    return parser.get_all(), None, parser.notes


@given(expressions)
def test_what_is_written_reads_as_it_was(value: Any) -> None:
    text = sxp.to_string(value)
    assert text.isascii() and "\n" not in text
    assert sxp.from_string(text) == value
    assert sxp.to_string(sxp.from_string(text)) == text


@given(st.binary(max_size=20))
def test_octets_that_are_no_text_go_round(data: bytes) -> None:
    value = sxp.from_string(sxp.to_string([data]))[0]
    assert sxp.octets(value) == data


@given(st.lists(expressions.filter(bool), max_size=4))
def test_several_expressions(values: list[Any]) -> None:
    text = "# first\n" + " # next\n".join(sxp.to_string(value) for value in values)
    assert sxp.all_from_string(text) == (values or None)


@given(near, st.lists(st.integers(0, 1000), max_size=6))
@example(b"'\\x4", [2])
def test_the_split_does_not_matter(data: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    pieces = [piece for start, end in itertools.pairwise(edges) if (piece := data[start:end])]
    assert read(sxp.Parser(), pieces) == read(sxp.Parser(), [data] if data else [])


@given(near)
def test_places_are_within_the_text(data: bytes) -> None:
    values, complaint, notes = read(sxp.Parser(located=True), [data] if data else [])
    lines = data.decode("utf-8", "surrogateescape").split("\n")
    lists = [value for value in values if isinstance(value, sxp.Located)]
    for place in (*notes, *lists):
        assert 1 <= place.line <= len(lines)
        assert place.column >= 1
    for value in lists:
        # characters that are no UTF-8 may be counted otherwise than Python shows them; ASCII shows that it fits
        if data.isascii():
            assert lines[value.line - 1][value.column - 1] == "("
    assert complaint is None or complaint.startswith("line ")


@given(near, st.integers(1, 30), st.integers(1, 4))
def test_limits_hold(data: bytes, limit_bytes: int, max_depth: int) -> None:
    values, _, _ = read(
        sxp.Parser(limit_bytes=limit_bytes, max_depth=max_depth), [bytes([octet]) for octet in data]
    )

    def depth(value: Any) -> int:
        return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0

    for value in values:
        assert depth(value) <= max_depth
        # no expression has more content than it had text
        assert sum(len(sxp.octets(leaf)) for leaf in leaves(value)) <= limit_bytes


def leaves(value: Any) -> list[str]:
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]


# -- configuration -------------------------------------------------------------------------------------------

keys = st.sampled_from([*XEND_KEYS, *COLO_KEYS, GROUP, "dom0-cpus", "nonsense"])
values = (
    st.sampled_from(["yes", "no", "0", "1", "8002", "99999", "", "auto", "[", "DEBUG", "/a/b", "a b"]) | texts
)
settings = st.lists(
    st.tuples(keys, values).map(list)
    | st.tuples(keys).map(list)
    | st.tuples(keys, values, values).map(list)
    | expressions,
    max_size=5,
)


@given(settings, settings)
def test_a_configuration_is_read_or_refused_with_a_line(top: list[Any], group: list[Any]) -> None:
    text = "\n".join(sxp.to_string(item) for item in [*top, [GROUP, *group]])
    try:
        read_config = config.read(text, config.DEFAULT_PATH)
    except ConfigError as error:
        assert str(error).startswith(f"{config.DEFAULT_PATH} line ")
        assert "\n" not in str(error)
        return
    for key in XEND_KEYS:
        read_config[key]
    for key in COLO_KEYS:
        read_config.ours(key)
    assert all("\n" not in note for note in read_config.notes)
