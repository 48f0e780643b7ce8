import pytest
from hostile_calls import CALLS, Bench, error_of


@pytest.fixture(scope="module")
def bench():
    return Bench()


def test_there_are_many():
    assert len(CALLS) >= 30


@pytest.mark.parametrize("name", CALLS)
def test_every_mistake_gets_a_clear_error(bench, name):
    error = error_of(bench, name)
    assert isinstance(error, (ValueError, OSError)), f"{name}: {error!r}"
    assert len(str(error)) > 20
