"""Amounts of memory, and budgets."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimgkit.engines.errors import UsageError
from zimgkit.runtime.memory.amounts import gigabytes, parse_budget, parse_bytes

UNITS = {
    "": 1, "B": 1, "kB": 10**3, "MB": 10**6, "gb": 10**9, "TB": 10**12,
    "K": 2**10, "KiB": 2**10, "m": 2**20, "mib": 2**20, "G": 2**30, "GiB": 2**30, "T": 2**40,
}  # fmt: skip


@given(st.integers(0, 10**6), st.integers(0, 999), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]))
def test_amounts_of_memory(whole: int, thousandths: int, unit: str, space: str) -> None:
    assert parse_bytes(f"{whole}{space}{unit}") == whole * UNITS[unit]
    exact = (whole + Fraction(thousandths, 1000)) * UNITS[unit]
    assert parse_bytes(f" {whole}.{thousandths:03}{space}{unit}\n") == exact.numerator // exact.denominator


def test_the_largest_amount() -> None:
    assert parse_bytes("9223372036854775807") == 2**63 - 1


@pytest.mark.parametrize(
    "text",
    ["", "GB", "-1", "1e9", "8 giga", "8iB", "8PB", "1,5GB", "0x10", "8GB 1", "nan", "9223372036854775808",
     "9999999999999GB", "9" * 5000, "1." + "9" * 5000],
)  # fmt: skip
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(UsageError, match="is no amount of memory; give bytes, such as 8GB or 512MiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("value", "budget"),
    [("8GB", 8 * 10**9), ("8GiB", 8 * 2**30), ("8192M", 2**33), (5, 5), ("50%", 500), ("12.5 %", 125), ("100%", 1000),
     ("auto", None), (" AUTO ", None), (None, None)],
)  # fmt: skip
def test_budgets(value: str | int | None, budget: int | None) -> None:
    assert parse_budget(value, 1000) == budget


@pytest.mark.parametrize("value", ["0", "0GB", "0%", "101%", "-1", -1, 0, "", "all", "%", True, 1.5, b"8GB", "8GB%"])
def test_what_is_no_budget(value: object) -> None:
    with pytest.raises(
        UsageError, match=r"memory is .*; give an amount such as 8GB or 512MiB, a share of what is free"
    ):
        parse_budget(value, 1000)  # type: ignore[arg-type]


def test_amounts_for_people() -> None:
    assert [gigabytes(n) for n in (7_840_000_000, 999_000_000, 0)] == ["7.8 GB", "999 MB", "0 MB"]
