"""TLS and token options: common to all servers that are named, or for one of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuner_client.cli.connecting import server_options
from tuner_core.errors import UsageError

SERVERS = ["gpu1:50061", "dns:///tuners.example:50061", "127.0.0.1:1"]


def options(environment: dict[str, str] | None = None, **given: list[str]):  # type: ignore[no-untyped-def]
    return server_options(SERVERS, tls=False, insecure=False, environment=environment or {}, **given)


def test_a_value_without_a_server_is_for_all_and_one_with_a_server_for_that_one(tmp_path: Path) -> None:
    common, own = tmp_path / "token", tmp_path / "a=b"
    common.write_text("common-token")
    own.write_text("own-token")
    for_address = options(
        tls_ca=["all.pem", "gpu1:50061=/etc/gpu1 ca.pem"],
        token_file=[str(common), f"tuners.example:50061={own}"],
        tls_name=["gpu1:50061=gpu"],
    )
    first, fleet = for_address("gpu1:50061"), for_address("tuners.example:50061")
    assert (first.tls_ca, first.token, first.tls_name) == (Path("/etc/gpu1 ca.pem"), "common-token", "gpu")
    assert (fleet.tls_ca, fleet.token, fleet.tls_name) == (Path("all.pem"), "own-token", "")


def test_a_server_without_a_token_of_its_own_gets_that_of_the_environment(tmp_path: Path) -> None:
    own = tmp_path / "token"
    own.write_text("own-token")
    for_address = options({"TUNER_TOKEN": "from-env"}, token_file=[f"127.0.0.1:1={own}"], tls_ca=["ca.pem"])
    assert for_address("127.0.0.1:1").token == "own-token"
    assert for_address("gpu1:50061").token == "from-env"


def test_a_file_name_with_an_equals_sign_is_a_file_name() -> None:
    assert options(tls_ca=["certs=all/ca.pem"])("gpu1:50061").tls_ca == Path("certs=all/ca.pem")


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (["gpu9:50061=ca.pem"], "gpu9:50061 is not among the servers"),
        (["a.pem", "b.pem"], "--tls-ca is given twice for all servers"),
        (["gpu1:50061=a.pem", "gpu1:50061=b.pem"], "--tls-ca is given twice for gpu1:50061"),
    ],
)
def test_a_value_that_fits_no_server_or_two_for_one_is_refused(entries: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        options(tls_ca=entries)
