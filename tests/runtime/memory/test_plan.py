"""What stays open within which budget."""

from __future__ import annotations

import pytest

from zimgkit.runtime.memory.machine import UNLIMITED
from zimgkit.runtime.memory.needs import BASE, Need
from zimgkit.runtime.memory.plan import BASE_ADDRESSES, Budget, Plan, Shortage, plan

ALL = ("text_encoder", "conditioner", "denoiser", "vae_decoder")
WHOLE = {
    "text_encoder": Need(mapped=40, held=4, working=2),
    "conditioner": Need(mapped=5, held=1, working=1),
    "denoiser": Need(mapped=60, held=6, working=10),
    "vae_decoder": Need(mapped=2, held=2, working=50),
}
TILED = WHOLE | {"vae_decoder": Need(mapped=2, held=2, working=5)}


def allowed(amount: int) -> Budget:
    return Budget(total=BASE + amount)


def free(amount: int) -> Budget:
    return Budget(own=BASE + amount, limit="the machine")


@pytest.mark.parametrize(
    ("budget", "stay", "tiled", "peak"),
    [
        (Budget(), ALL, False, 170),
        (allowed(170), ALL, False, 170),
        (allowed(169), ALL[1:], False, 126),
        (allowed(125), ALL[2:], False, 120),
        (allowed(119), ("vae_decoder",), False, 80),
        (allowed(79), (), False, 76),
        # The whole decode does not matter to the others.
        (allowed(76), (), False, 76),
        # Nothing is given up to tiles before engines are opened in turn.
        (free(63), ALL, False, 170),
        (free(62), ALL[1:], False, 126),
        (free(52), ("vae_decoder",), False, 80),
        (free(51), ALL, True, 130),
        (free(16), (), True, 76),
        (Budget(own=BASE + 63, total=BASE + 126), ALL[1:], False, 126),
        (Budget(address_space=BASE + BASE_ADDRESSES + 126), ALL[1:], False, 126),
    ],
)
def test_as_much_stays_open_as_fits(budget: Budget, stay: tuple[str, ...], tiled: bool, peak: int) -> None:
    found = plan(WHOLE, TILED, budget)
    assert isinstance(found, Plan)
    assert (found.stay, found.in_turn) == (stay, ALL[: len(ALL) - len(stay)])
    assert (found.tiled, found.peak - BASE) == (tiled, peak)


@pytest.mark.parametrize(
    ("budget", "shortage"),
    [
        (allowed(75), Shortage("denoiser", BASE + 76, BASE + 75, "allowed")),
        (free(15), Shortage("denoiser", BASE + 16, BASE + 15, "free (the machine)")),
        (
            Budget(address_space=BASE + BASE_ADDRESSES + 75),
            Shortage("denoiser", BASE + BASE_ADDRESSES + 76, BASE + BASE_ADDRESSES + 75, "left of RLIMIT_AS"),
        ),
    ],
)
def test_what_does_not_fit(budget: Budget, shortage: Shortage) -> None:
    assert plan(WHOLE, TILED, budget) == shortage


def test_without_tiles_the_decoder_is_what_does_not_fit() -> None:
    assert plan(WHOLE, None, free(51)) == Shortage("vae_decoder", BASE + 52, BASE + 51, "free (the machine)")


def test_tiles_that_are_asked_for() -> None:
    found = plan({}, TILED, Budget())
    assert isinstance(found, Plan)
    assert (found.tiled, found.stay) == (True, ALL)


def test_nothing_stays_open_where_that_is_asked_for() -> None:
    found = plan(WHOLE, TILED, free(UNLIMITED // 2), in_turn=True)
    assert isinstance(found, Plan)
    assert (found.stay, found.in_turn, found.tiled) == ((), ALL, False)


def test_weights_that_are_read_again_in_every_run() -> None:
    found = plan(WHOLE, TILED, free(63))
    assert isinstance(found, Plan)
    assert found.rereads == ()
    large = WHOLE | {"denoiser": Need(mapped=BASE + 100, held=6, working=10)}
    found = plan(large, None, free(63))
    assert isinstance(found, Plan)
    assert found.rereads == ("denoiser",)


def test_files_that_an_engine_lets_go_of_count_as_addresses_alone() -> None:
    needs = {"denoiser": Need(mapped=60, held=66, working=10, releases=True)}
    assert isinstance(plan(needs, None, allowed(76)), Plan)
    assert isinstance(plan(needs, None, allowed(75)), Shortage)
    assert isinstance(plan(needs, None, Budget(address_space=BASE + BASE_ADDRESSES + 136)), Plan)
    assert isinstance(plan(needs, None, Budget(address_space=BASE + BASE_ADDRESSES + 135)), Shortage)
