"""The loop in C: compiled once, and done without where it cannot be compiled."""

import pytest
from tests.distributed.harness import run_ranks

from pipermoe.exchange.executor import Exchange
from pipermoe.exchange.host import native


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_it_is_compiled_once_into_the_users_cache(empty_cache, monkeypatch):
    if not native.build():
        pytest.skip("needs a C compiler")
    assert native.library_path().parent == empty_cache / "pipermoe"
    monkeypatch.setenv("CC", "no-such-compiler")
    assert native.build()
    assert [path.name for path in native.library_path().parent.iterdir()] == [native.library_path().name]


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_nothing_is_built_and_nothing_stays(empty_cache, monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    assert not native.build()
    assert not list(empty_cache.rglob("*.*"))


def transport(rank):
    return Exchange().transport.name


@pytest.mark.distributed
def test_without_a_compiler_the_loop_is_pythons(empty_cache, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert run_ranks(transport, 2) == ["python"] * 2
