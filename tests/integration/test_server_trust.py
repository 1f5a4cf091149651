"""A real server with TLS and tokens: who may call, and whose job it is."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.integration.client_process import client
from tests.integration.test_server_lifecycle import server
from tests.integration.tiny_models import write_nothing_to_tune

TOKEN = "0123456789abcdef"


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for this host and its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


def test_calls_need_a_token_and_jobs_belong_to_its_team(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    tokens = tmp_path / "tokens.txt"
    tokens.write_text(f"# token and team\n{TOKEN} vision\n")
    model = tmp_path / "relu.onnx"
    write_nothing_to_tune(model)
    options = ["--lazy", "--tls-cert", str(cert), "--tls-key", str(key), "--token-file", str(tokens)]
    with server(tmp_path / "d", *options) as running:
        address = ["--server", running.address, "--tls-ca", str(cert)]
        nobody = client("jobs", *address, data_dir=tmp_path)
        assert nobody.returncode == 1 and "token" in nobody.stderr

        stranger = client("jobs", *address, data_dir=tmp_path, TUNER_TOKEN="another-long-token")
        assert stranger.returncode == 1 and "token" in stranger.stderr

        plain = client("jobs", "--server", running.address, data_dir=tmp_path, TUNER_TOKEN=TOKEN)
        assert plain.returncode == 1 and plain.stderr.count("\n") == 1

        run = client(
            *("tune", str(model), *address, "--team", "another", "--json"),
            data_dir=tmp_path,
            timeout_s=120,
            TUNER_TOKEN=TOKEN,
        )
        document = json.loads(run.stdout)
        assert (run.returncode, document["status"]) == (0, "done"), run.stderr
        assert document["team"] == "vision"  # the token's, whatever the request says
