"""As much of ``train.py`` as a sweep sees: a run folder with numbers, signals, exit codes.

Its loss falls to (log10(lr) + 3)^2 + kl_weight, one row at a time. A learning rate above 1 fails.
"""

import argparse
import math
import signal
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("command", choices=["fit"])
parser.add_argument("-c", action="append")
parser.add_argument("--name", default="")
parser.add_argument("--output_dir", type=Path)
parser.add_argument("--ckpt_path", choices=["auto"])
parser.add_argument("--lr", type=float, required=True)
parser.add_argument("--kl_weight", type=float, required=True)
parser.add_argument("--trainer.max_steps", type=int, default=4, dest="max_steps")
parser.add_argument("--trainer.enable_progress_bar")
parser.add_argument("--row_s", type=float, default=0.0)
parser.add_argument("--print_config", action="store_true")
given = parser.parse_args()
if given.print_config:
    sys.exit()
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
if given.lr > 1:
    print("error: the loss is not finite")
    sys.exit(1)
home = given.output_dir / given.name
run = home / "2026-01-01_00-00-00"
run.mkdir(parents=True, exist_ok=True)
(home / "last").unlink(missing_ok=True)
(home / "last").symlink_to(run.name)
(run / "config.yaml").write_text(f"name: {given.name}\ntrainer: {{}}\nlr: {given.lr}\n")
metrics = run / "metrics.csv"
if not metrics.is_file():
    metrics.write_text("step,val/loss\n")

loss = (math.log10(given.lr) + 3) ** 2 + given.kl_weight
for step in range(len(metrics.read_text().splitlines()), given.max_steps + 1):
    time.sleep(given.row_s)
    with metrics.open("a") as file:
        file.write(f"{step},{loss + 1 / step}\n")
