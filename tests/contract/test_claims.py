"""What the claims of every store promise."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.contract.conftest import CLAIM_URLS
from tuner_core.errors import UsageError
from tuner_core.store.claims import Claims
from tuner_core.store.open import open_store

ROOT = Path(__file__).parents[2]
RACER = """
import sys
from tuner_core.store.open import open_store
url, holder = sys.argv[1:]
store = open_store(url)
claims = store.claims
print("ready", flush=True)
sys.stdin.readline()
won = [key for key in map(str, range(50)) if claims.claim(key, holder, 30).mine]
print(*won)
store.close()
"""


@pytest.fixture(params=list(CLAIM_URLS))
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store of each kind is."""
    return str(CLAIM_URLS[request.param](tmp_path, request))


@pytest.fixture
def claims(url: str, request: pytest.FixtureRequest) -> Claims:
    """Claims of an empty store."""
    store = open_store(url)
    request.addfinalizer(store.close)
    return store.claims


def test_the_first_claimer_holds_the_key_and_the_second_sees_who(claims: Claims) -> None:
    first = claims.claim("a key: with {odd} letters", "team-a", 30)
    second = claims.claim("a key: with {odd} letters", "team-b", 30)
    assert (first.mine, first.holder) == (True, "team-a")
    assert (second.mine, second.holder, second.token) == (False, "team-a", first.token)
    assert 0 < second.expires_in_s <= 30
    assert claims.claim("another key", "team-b", 30).mine


def test_claiming_again_keeps_the_token(claims: Claims) -> None:
    assert claims.claim("k", "a", 30).token == claims.claim("k", "a", 60).token


def test_a_released_key_is_free_and_its_next_token_is_larger(claims: Claims) -> None:
    first = claims.claim("k", "a", 30)
    assert claims.release("k", first.token)
    assert not claims.release("k", first.token)
    second = claims.claim("k", "a", 30)
    assert second.mine
    assert second.token > first.token


def test_a_claim_whose_holder_died_expires_and_the_old_token_is_worth_nothing(claims: Claims) -> None:
    first = claims.claim("k", "dead", 0.05)
    while not (second := claims.claim("k", "heir", 30)).mine:
        time.sleep(0.01)
    assert second.token > first.token
    assert not claims.renew("k", first.token, 30)
    assert not claims.release("k", first.token)
    assert claims.renew("k", second.token, 30)


def test_a_renewed_claim_lasts(claims: Claims) -> None:
    first = claims.claim("k", "a", 0.2)
    assert claims.renew("k", first.token, 60)
    assert claims.claim("k", "b", 30).expires_in_s > 50


def test_a_late_renewal_counts_while_nobody_has_taken_the_key(claims: Claims) -> None:
    first = claims.claim("k", "a", 0.01)
    time.sleep(0.03)
    assert claims.renew("k", first.token, 30)
    assert not claims.claim("k", "b", 30).mine


@pytest.mark.parametrize(("key", "holder", "ttl_s"), [("", "a", 1.0), ("k", "", 1.0), ("k", "a", 0.0)])
def test_senseless_arguments_are_usage_errors(claims: Claims, key: str, holder: str, ttl_s: float) -> None:
    with pytest.raises(UsageError):
        claims.claim(key, holder, ttl_s)


def test_of_many_threads_one_wins(claims: Claims) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: claims.claim("k", f"holder-{number}", 30), range(8)))
    assert sum(claim.mine for claim in found) == 1
    assert len({claim.token for claim in found}) == 1


def test_of_two_racing_processes_exactly_one_wins_each_key(url: str) -> None:
    open_store(url).close()
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, url, holder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for holder in ("left", "right")
    ]
    for racer in racers:
        assert racer.stdout and racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = [racer.communicate(timeout=60)[0].split() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert sorted(won[0] + won[1], key=int) == [str(number) for number in range(50)]
