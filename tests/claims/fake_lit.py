"""Stands in for a ``lit`` run: leaves the files of one within milliseconds. ``--behave`` says how; starts are noted in ``$FAKE_LOG``."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

sources, *words = sys.argv[1:]
given = dict(zip(words, [*words[1:], ""], strict=True))
behaviour = given.get("--behave", "well")
with open(os.environ["FAKE_LOG"], "a", encoding="utf-8") as log:
    log.write(f"{given['--stage']}-{given['--seed']} {time.time()} {os.getpid()} {given.get('--from', '')}\n")
print("first line\nlast line", flush=True)
run = Path(given["--run_root"], given["--name"], "20260101-000000")
(run / "checkpoints").mkdir(parents=True)
if behaviour == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    Path(os.environ["FAKE_LOG"] + ".child").write_text(str(child.pid))
    time.sleep(3600)
time.sleep(float(given.get("--seconds", 0)))
for _ in range(6000):  # five minutes
    if given.get("--until", "") in Path(os.environ["FAKE_LOG"]).read_text():
        break
    time.sleep(0.05)
else:
    sys.exit(4)
if behaviour == "fail":
    sys.exit(3)
if behaviour == "missing":
    Path(sources).with_name("missing.json").write_text(json.dumps({"missing": "no digits here"}))
    sys.exit(1)
metrics = {"acc": "NaN" if behaviour == "diverge" else 0.5 + 0.1 * int(given["--seed"]) + 0.2 * (given["--stage"] == "good"), "other": 1.0}
(run / "metrics.jsonl").write_text(json.dumps({"step": 1, "epoch": 0, "metrics": metrics}) + "\n")
cost = {"steps": 4, "batches": 4, "parameters": 10, "flops_per_batch": None, "seconds": [0.1], "data_seconds": [0.0], "peak_mib": 1.0}
(run / "cost.json").write_text(json.dumps(cost | {"interrupted": behaviour == "preempted", "memory": "resident", "device": "cpu"}))
(run / "checkpoints" / "last.ckpt").write_text("weights")
Path(sources).write_text(os.environ.get("FAKE_SOURCES", "{}"))
