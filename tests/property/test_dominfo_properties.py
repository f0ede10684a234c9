# SPDX-License-Identifier: LGPL-2.1-or-later
"""Properties of a domain's description: dictionaries of it become one that gives the same dictionaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from remus_colo import dominfo, sxp

EXAMPLE = sxp.from_string((Path(__file__).parents[2] / "examples" / "domain.sxp").read_text())

words = st.sampled_from(["a", "b", "device", "vif", ""])
# few names, so that elements often have one in common
descriptions = st.lists(
    st.recursive(words, lambda inner: st.lists(inner, max_size=4), max_leaves=20), max_size=5
).map(lambda elements: ["domain", *elements])


@given(descriptions)
@example(EXAMPLE)
@example(["domain", ["cpus", [[]]]])
def test_dictionaries_of_a_description_go_round(description: list[Any]) -> None:
    parsed = dominfo.parse(description)
    written = sxp.to_string(dominfo.unparse(parsed))
    assert dominfo.parse(sxp.from_string(written)) == parsed
