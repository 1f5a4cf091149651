"""The client against a real server process: tune, reuse, look up, build, transfer."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest

from tests.integration.client_process import client, environment, start_client
from tests.integration.tiny_models import write_nothing_to_tune, write_tiny_cnn
from tuner_core.model import Origin, trial_id
from tuner_core.store.interface import RecordFilter
from tuner_core.store.remote import RemoteStore
from tuner_core.transport.channel import open_channel
from tuner_core.transport.options import ConnectionOptions

TRIALS = 24


@contextlib.contextmanager
def running_server(data_dir: Path, listen: str = "127.0.0.1:0") -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """``tuner-server`` as a process, and its address."""
    ready, writer = os.pipe()
    data_dir.mkdir(exist_ok=True)
    with (data_dir / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tuner_server", "--lazy", "--listen", listen),
                *("--data-dir", str(data_dir), "--ready-fd", str(writer)),
            ],
            env=environment(),
            pass_fds=[writer],
            stdout=log,
            stderr=log,
        )
    os.close(writer)
    try:
        with os.fdopen(ready) as said:
            answer = json.loads(said.readline() or "{}")
        assert "address" in answer, (data_dir / "server.log").read_text()
        yield process, answer["address"]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass
class Tuned:
    """A server, and a model that was tuned on it once."""

    address: str
    folder: Path
    model: Path
    weights: dict[str, np.ndarray]
    document: dict[str, Any]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return client(*arguments, "--server", self.address, data_dir=self.folder, timeout_s=180)

    def json(self, *arguments: str) -> Any:
        run = self.run(*arguments, "--json")
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuned]:
    folder = tmp_path_factory.mktemp("client")
    model = folder / "tiny.onnx"
    weights = write_tiny_cnn(model)
    with running_server(tmp_path_factory.mktemp("server")) as (_, address):
        found = Tuned(address, folder, model, weights, {})
        output = str(folder / "tiny.so")
        found.document = found.json("tune", str(model), "--trials", str(TRIALS), "--team", "vision", "-o", output)
        yield found


def test_a_tune_ends_with_a_verified_operator_and_a_measured_model_with_the_same_output(tuned: Tuned) -> None:
    document = tuned.document
    assert document["status"] == "done"
    assert document["trials"]["measured"] == TRIALS
    assert document["sm_percent"] == 100
    (conv,) = (task for task in document["tasks"] if task["description"].startswith("conv2d"))
    assert conv["state"] in ("tuned", "fallback")  # so few trials need not beat the fallback schedule
    assert conv["verified"] is True
    assert conv["trials"] > 0
    assert conv["best_latency_us"] <= conv["baseline_latency_us"]
    assert document["outputs_match"] is True
    assert document["model_latency_us"]["baseline"] > 0
    assert document["model_latency_us"]["tuned"] > 0


def test_the_built_file_is_the_model_with_its_weights_for_stock_tvm(tuned: Tuned, tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((1, 16, 28, 28)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    script = (
        "import sys, numpy, tvm\n"
        "from tvm import relax\n"
        "assert not any(name.startswith('tuner_') for name in sys.modules)\n"
        "vm = relax.VirtualMachine(tvm.runtime.load_module(sys.argv[1]), tvm.cpu())\n"
        "y = vm['main'](tvm.runtime.tensor(numpy.load('x.npy')))\n"
        "numpy.save('y.npy', (y if hasattr(y, 'numpy') else y[0]).numpy())\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, tuned.document["output"]], cwd=tmp_path, check=True, env=environment(tmp_path)
    )
    (expected,) = onnx.reference.ReferenceEvaluator(onnx.load(tuned.model)).run(None, {"x": x})
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected).max() > 0.1


def test_a_second_run_measures_nothing_new_and_says_what_it_reused(tuned: Tuned) -> None:
    again = tuned.json("tune", str(tuned.model), "--trials", str(TRIALS))
    assert again["status"] == "done"
    assert again["trials"]["measured"] == 0
    assert again["trials"]["reused"] >= TRIALS
    text = tuned.run("watch", again["job"]).stdout
    assert "reused from the store" in text


def test_records_are_found_by_operator_team_and_job(tuned: Tuned) -> None:
    job = tuned.document["job"]
    best = tuned.json("query", "--op", "conv2d", "--team", "vision", "--job", job, "--verified", "--top", "1")
    (record,) = best["records"]
    assert record["verified"] is True
    assert record["median_us"] > 0
    assert record["job"] == job
    assert record["sm_percent"] == 100
    assert record["trace"]
    assert best["next"] is None
    assert tuned.json("query", "--op", "conv2d", "--team", "nobody") == {"records": [], "next": None}
    assert "conv2d 1x16x28x28" in tuned.run("query", "--op", "conv2d").stdout


def test_pages_of_a_query_continue_without_repeating(tuned: Tuned) -> None:
    first = tuned.json("query", "--limit", "4")
    second = tuned.json("query", "--limit", "4", "--cursor", first["next"])
    ids = [record["trial_id"] for record in first["records"] + second["records"]]
    assert len(ids) == len(set(ids)) == 8


def test_build_uses_the_records_and_says_how_many_operators_they_cover(tuned: Tuned) -> None:
    publish_best_search_record(tuned)
    output = tuned.folder / "built.so"
    run = tuned.run("build", str(tuned.model), "--sm-percent", "100", "-o", str(output))
    assert run.returncode == 0, run.stderr
    found = re.search(r"(\d) of 4 operators tuned \((\d) verified\)", run.stdout)
    assert found is not None, run.stdout
    assert int(found[1]) == int(found[2]) >= 1
    assert output.stat().st_size > 0


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores for two shares")
def test_build_takes_another_shares_record_only_on_request_and_says_so(tuned: Tuned) -> None:
    publish_best_search_record(tuned)
    build = ("build", str(tuned.model), "--sm-percent", "50", "-o", str(tuned.folder / "half.so"))
    strict = tuned.json(*build)["coverage"]
    assert strict["tuned"] == 0 and strict["looser"] == {}
    assert any(name.startswith("conv2d") for name in strict["missing"])
    run = tuned.run(*build, "--nearest-share")
    assert run.returncode == 0, run.stderr
    said = " ".join(run.stdout.split())
    assert re.search(r"1 of 4 operators tuned .*1 by records of another share", said), said
    assert re.search(r"looser: conv2d .*: no record for .* with 1 SMs; nearest: .* with \d+ SMs", said), said


APPLY = """
import json, logging, sys
from pathlib import Path
logging.basicConfig(stream=sys.stderr, format="LOG %(message)s", level=logging.WARNING)
from tuner_client import RecordDatabase
from tuner_client.model.load import load_model
from tuner_client.model.prepare import prepare
from tvm import relax
from tvm.target import Target
address, model, target = sys.argv[1:]
module = prepare(load_model(Path(model), {}).module, target).module
def applied(**options):
    database = RecordDatabase(address, **options)
    with Target(json.loads(target)), database:
        tuned = relax.transform.MetaScheduleApplyDatabase()(module)
    facts = [database.place.device_model, database.place.sm_count, len(database) > 0]
    database.close()
    return facts + [sorted(
        var.name_hint for var, function in tuned.functions.items()
        if function.attrs and function.attrs.get("tirx.is_scheduled")
    )]
print(json.dumps([applied(sm_percent=100), applied(sm_count=77), applied(sm_count=77, strict=False)]))
"""


def test_tvms_own_pass_applies_the_records_of_a_servers_share_and_looser_ones_only_on_request(tuned: Tuned) -> None:
    publish_best_search_record(tuned)
    target = json.dumps(tuned.document["target"])
    run = subprocess.run(
        [sys.executable, "-c", APPLY, tuned.address, str(tuned.model), target],
        env=environment(tuned.folder),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    exact, strict, looser = json.loads(run.stdout)
    assert exact[:3] == [tuned.document["device"], tuned.document["sm_count"], True]
    (conv,) = [name for name in exact[3] if "conv2d" in name]
    assert strict[1:] == [77, False, []]
    assert conv in looser[3]
    said = [line for line in run.stderr.splitlines() if line.startswith("LOG conv2d")]
    assert said and all("with 77 SMs; nearest: " in line for line in said)


def publish_best_search_record(tuned: Tuned) -> None:
    """Another team's verified record for the convolution, faster than any: what ``build`` must find."""
    options = ConnectionOptions(tuned.address)
    with open_channel(options) as channel:
        store = RemoteStore(channel)
        page = store.query(RecordFilter(op="conv2d", job=tuned.document["job"]), limit=1000)
        found = next(record for record in page.records if record.origin is Origin.SEARCH and not record.verified)
        better = dataclasses.replace(
            found,
            trial_id=trial_id(found.key, found.trace, "job-elsewhere", True),
            job="job-elsewhere",
            team="elsewhere",
            verified=True,
            latencies_us=(0.5,),
            median_us=0.5,
            ci_low_us=0.5,
            ci_high_us=0.5,
        )
        store.commit([better])
        assert store.top(found.key) == [better]


def test_watch_builds_later_and_refuses_another_file(tuned: Tuned) -> None:
    job = tuned.document["job"]
    output = tuned.folder / "later.so"
    document = tuned.json("watch", job, "--output", str(output), "--model", str(tuned.model))
    assert document["output"] == str(output)
    assert document["coverage"]["operators"] == len(tuned.document["tasks"])
    other = tuned.folder / "other.onnx"
    write_tiny_cnn(other, seed=1)
    run = tuned.run("watch", job, "--output", str(output), "--model", str(other))
    assert "is not the file" in run.stderr
    assert run.returncode == 1


def test_a_database_goes_out_and_in_again(tuned: Tuned, tmp_path: Path) -> None:
    folder = tmp_path / "database"
    exported = tuned.json("export", str(folder), "--op", "conv2d")
    assert exported["records"] > 0
    before = tuned.json("stats")["records"]
    imported = tuned.json("import", str(folder), "--team", "audio")
    assert imported["records"] == exported["records"]
    assert imported["stored"] > 0
    assert tuned.json("stats")["records"] == before + imported["stored"]
    (record,) = tuned.json("query", "--team", "audio", "--top", "1")["records"]
    assert record["origin"] == "import"


def test_logs_show_the_newest_records_one_per_line(tuned: Tuned) -> None:
    run = tuned.run("logs", "-n", "3", "--json")
    documents = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(documents) == 3
    times = [document["created_at"] for document in documents]
    assert times == sorted(times)


def test_a_detached_job_is_followed_by_another_client_and_cancelled(tuned: Tuned) -> None:
    document = tuned.json("tune", str(tuned.model), "--trials", "5000", "--refresh", "--detach")
    assert document["status"] == "detached"
    job = document["job"]
    watching = start_client("watch", job, "--server", tuned.address, "--json", data_dir=tuned.folder)
    assert watching.stderr is not None
    while "trials" not in watching.stderr.readline():
        pass
    cancelled = tuned.json("cancel", job)
    assert cancelled["status"] == "cancelled"
    out, _ = watching.communicate(timeout=60)
    assert json.loads(out)["status"] == "cancelled"
    assert watching.returncode == 1
    assert [entry["status"] for entry in tuned.json("jobs")["jobs"] if entry["job"] == job] == ["cancelled"]


def test_a_model_with_nothing_to_tune_is_done_and_still_built(tuned: Tuned) -> None:
    model, output = tuned.folder / "relu.onnx", tuned.folder / "relu.so"
    write_nothing_to_tune(model)
    document = tuned.json("tune", str(model), "--output", str(output))
    assert document["status"] == "done"
    assert document["trials"]["measured"] == 0
    assert all(task["state"] in ("skipped", "fallback") for task in document["tasks"])
    assert output.stat().st_size > 0


def test_the_request_holds_no_weight(tuned: Tuned) -> None:
    """Run in a process of its own: it imports TVM."""
    script = (
        "import sys, zlib, numpy, onnx, base64\n"
        "from pathlib import Path\n"
        "from onnx import numpy_helper\n"
        "from tuner_client.model.load import load_model\n"
        "from tuner_client.model.prepare import prepare\n"
        "from tuner_client.request import TuneRequest\n"
        "from tuner_client.submit import job_spec\n"
        "path, target = Path(sys.argv[1]), sys.argv[2]\n"
        "prepared = prepare(load_model(path, {}).module, target)\n"
        "spec = job_spec(TuneRequest(path), prepared, digest='', target_json=target)\n"
        "sent = [spec.SerializeToString(), zlib.decompress(spec.lifted_module_zlib)]\n"
        "sent += [zlib.decompress(task.workload.body_zlib) for task in spec.tasks]\n"
        "for tensor in onnx.load(path).graph.initializer:\n"
        "    weight = numpy_helper.to_array(tensor)\n"
        "    for layout in (weight, weight.T):\n"
        "        raw = numpy.ascontiguousarray(layout).tobytes()\n"
        "        pieces = [raw[at : at + 24] for at in range(0, 240, 24)]\n"
        "        texts = [base64.b64encode(raw)[at : at + 32] for at in range(0, 320, 32)]\n"
        "        assert not any(piece in data for piece in pieces + texts for data in sent), tensor.name\n"
        "    printed = [repr(float(value))[:7].encode() for value in weight.ravel()[:3]]\n"
        "    assert not all(text in sent[1] for text in printed), tensor.name\n"
        "assert spec.trials == 64 * sum(task.tunable for task in spec.tasks)\n"
    )
    target = json.dumps(tuned.document["target"])
    run = subprocess.run(
        [sys.executable, "-c", script, str(tuned.model), target],
        env=environment(tuned.folder),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
