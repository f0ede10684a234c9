# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cache of built images: whole entries only, one builder at a time."""

import os
import threading
import time

import pytest

from remus_colo.testbed import cache

DAY_S = 24 * 3600.0


def test_the_directory_follows_the_environment(tmp_path):
    own, xdg, home = tmp_path / "own", tmp_path / "xdg", tmp_path / "home"
    every = {"REMUS_COLO_CACHE": str(own), "XDG_CACHE_HOME": str(xdg), "HOME": str(home)}
    assert cache.cache_dir(every) == own
    del every["REMUS_COLO_CACHE"]
    assert cache.cache_dir(every) == xdg / "remus_colo"
    del every["XDG_CACHE_HOME"]
    assert cache.cache_dir(every) == home / ".cache" / "remus_colo"
    assert own.is_dir()


def test_an_entry_is_built_once_per_recipe(tmp_path):
    built = []

    def build(path):
        built.append(path)
        path.write_text("content")

    first = cache.entry("disk", {"a": 1}, build, tmp_path)
    assert cache.entry("disk", {"a": 1}, build, tmp_path) == first
    other = cache.entry("disk", {"a": 2}, build, tmp_path)
    assert len(built) == 2
    assert first.read_text() == other.read_text() == "content"
    assert first != other


def test_a_failed_build_leaves_nothing(tmp_path):
    def build(path):
        path.mkdir()
        (path / "half").write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        cache.entry("disk", 1, build, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["disk.lock"]


def test_what_a_dead_builder_left_is_removed(tmp_path):
    (tmp_path / ".partial-disk-1").mkdir()
    (tmp_path / ".partial-disk-1" / "half").write_text("half")
    (tmp_path / ".partial-other-1").mkdir()
    cache.entry("disk", 1, lambda path: path.write_text("whole"), tmp_path)
    assert not (tmp_path / ".partial-disk-1").exists()
    assert (tmp_path / ".partial-other-1").exists()


def test_the_second_of_two_builders_takes_the_result_of_the_first(tmp_path):
    started, go_on = threading.Event(), threading.Event()
    built, results = [], []

    def build(path):
        built.append(path)
        started.set()
        assert go_on.wait(20)
        path.write_text("whole")

    threads = [
        threading.Thread(target=lambda: results.append(cache.entry("disk", 1, build, tmp_path)))
        for _ in range(2)
    ]
    threads[0].start()
    assert started.wait(20)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert len(built) == 1
    assert results == [results[0]] * 2


def test_old_entries_go_but_recent_and_used_ones_stay(tmp_path):
    def make(recipe, age_s):
        path = cache.entry("disk", recipe, lambda path: path.write_text("x"), tmp_path)
        then_s = time.time() - age_s
        os.utime(path, (then_s, then_s))
        return path

    unrelated = tmp_path / "disk-image-0123456789abcdef"
    unrelated.write_text("another kind")
    os.utime(unrelated, (0, 0))
    old = [make(n, (9 - n) * DAY_S) for n in range(5)]
    cache.entry("disk", "new", lambda path: path.write_text("x"), tmp_path)
    assert [path.exists() for path in old] == [False, False, True, True, True]
    assert unrelated.exists()


def test_recipes_hash_by_content_not_by_order():
    assert cache.recipe_hash({"a": 1, "b": [2]}) == cache.recipe_hash({"b": [2], "a": 1})
    assert cache.recipe_hash({"a": 1}) != cache.recipe_hash({"a": 2})
