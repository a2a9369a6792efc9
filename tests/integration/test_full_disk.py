"""A full disk: an error that names the file, and nothing half-written. On a real file system of 300 KiB."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMESPACE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]

PRELUDE = """
import io, os, sys
from pathlib import Path
disk = Path(sys.argv[1])
"""

EXPORT = """
import torch
from trainer.safetensors_folder import SafetensorsFolder
writer = SafetensorsFolder(disk / "export")
try:
    for number in range(4):
        writer.add([(f"w{number}", torch.zeros(40_000))])
except OSError as error:
    writer.abandon()
    print(error)
print(sorted(os.listdir(disk)))
"""

REPORT = """
from orchestrator.report import Reporter
reporter = Reporter(disk, io.StringIO())
(disk / "summary.json").write_text("{}")
try:
    for step in range(1_000_000):
        reporter.write("step", step, {f"metric{n}": 0.5 for n in range(100)})
except OSError as error:
    print(error)
try:
    reporter.summary({"pad": "x" * 10_000})
except OSError as error:
    print(error)
print((disk / "summary.json").read_text(), sorted(p.name for p in disk.glob("summary*")))
"""


def on_full_disk(folder: Path, code: str) -> str:
    script = 'mount -t tmpfs -o size=300k none "$0" && exec "$1" -c "$2" "$0"'
    command = [*NAMESPACE, "sh", "-c", script, str(folder), sys.executable, PRELUDE + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


needs_mounts = pytest.mark.skipif(
    subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode != 0,
    reason="this system lets nobody mount a small file system",
)


@needs_mounts
def test_an_export_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = on_full_disk(tmp_path, EXPORT)
    assert "model-00002.safetensors" in out and "No space left on device" in out
    assert out.endswith("[]\n")


@needs_mounts
def test_metrics_and_summary_name_their_file_and_the_old_summary_stays(tmp_path: Path) -> None:
    lines = on_full_disk(tmp_path, REPORT).splitlines()
    assert "No space left on device" in lines[0] and "metrics.jsonl" in lines[0]
    assert "No space left on device" in lines[1] and "summary" in lines[1]
    assert lines[2] == "{} ['summary.json']"
