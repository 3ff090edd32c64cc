"""Commands: what is said wrongly is refused in one line."""

import pytest

from brainseg import commands
from brainseg.errors import UsageError
from brainseg.watch import Price


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
def test_what_is_no_price_is_refused(price: float) -> None:
    with pytest.raises(UsageError, match="--price-per-hour"):
        commands.priced(price, "EUR")


def test_a_price_that_nobody_states_is_none() -> None:
    assert commands.priced(None, "EUR") is None
    assert commands.priced(0.0, "CHF") == Price(0.0, "CHF")
