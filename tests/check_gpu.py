"""`make gpu` rehearsed on a CPU, small: every stage ends, and what the tables are made from is there."""

import json
import subprocess
import sys

from helpers.run import ROOT


def test_every_stage_ends_and_leaves_its_results(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--budget", "400", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    log = (tmp_path / "log.txt").read_text()[-3000:]
    ended = json.loads((tmp_path / "gpu-cpu.json").read_text())["stages"]
    slow = ended.pop("compile")  # whose compilers take what time they take
    assert slow.startswith(("done", "its time was up", "no time was left")), log
    assert all(how.startswith("done") for how in ended.values()), (done.stdout, log)
    found = {name: json.loads((tmp_path / f"{name}-cpu.json").read_text()) for name in ("latency", "bench", "profile")}
    assert {row["variant"] for row in found["latency"]["rows"]} >= {"textbook", "eager", "TorchScript"}
    assert all(row["parity"] for row in found["latency"]["rows"] if row["variant"] == "TorchScript")
    assert set(found["bench"]["training"]) >= {"textbook", "fp32", "bf16"}
    assert found["profile"]["milliseconds"]["after"] > 0
    assert "no check failed" in done.stdout, done.stdout
    assert json.loads((tmp_path / "gpu-cpu.json").read_text())["checks"]["classic, fp32: twice the same, bit for bit"]
