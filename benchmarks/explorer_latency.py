"""Time from a pose to an answer that can be seen, in the landscape explorer, over HTTP.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE python -m benchmarks.explorer_latency \
        --policy_path outputs/demo/last --dataset_repo_id DEMOS.hdf5

Headless Chromium asks ``analyze.py browse``'s server as the page does while somebody drags: one
question at a time, each about another pose (agent and T walk over the board, the T turns). A time
ends when all pictures of the answer are decoded in the page; drawing them on the screen is not in
it. The first answer fits the kernel scale and reads demonstrations: it is stated by itself. Wall
time, with whatever else the machine does: its load is in the file.
"""

import argparse
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from playwright.sync_api import Page, sync_playwright

from browser.explorer import Explorer, Question, place
from browser.server import create_app, serving
from envs.push_t import PushTTask
from policies.loading import load_policy

TARGET_MS = 300.0
ASK = """async (questions) => {
  const took = [];
  for (const question of questions) {
    const began = performance.now();
    const response = await fetch("/api/explorer/answer", {
      method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(question),
    });
    const text = await response.text();
    const answer = JSON.parse(text);
    if (!response.ok) throw new Error(answer.error);
    const urls = [answer.scene];
    for (const each of answer.answers) {
      urls.push(each.landscape.heat, ...each.attention.cameras.map((camera) => camera.picture));
    }
    await Promise.all(urls.filter(Boolean).map((url) => {
      const picture = new Image();
      picture.src = url;
      return picture.decode();
    }));
    took.push([performance.now() - began, answer.elapsed_ms, text.length]);
  }
  return took;
}"""


def poses(start: list[float], n_poses: int) -> list[list[float]]:
    """Where a hand might drag things, from a recorded pose on."""
    generator = np.random.default_rng(0)
    steps = generator.normal(0, [12, 12, 4, 4, 0.1], (n_poses, 5))
    walk = np.array(start) + steps.cumsum(0)
    return [place(state, PushTTask()).state.tolist() for state in walk]


def measure(page: Page, questions: list[dict[str, Any]]) -> dict[str, float]:
    """Median and 95 % quantile of the answers."""
    total, server, n_characters = np.array(page.evaluate(ASK, questions)).T
    return {
        "median_ms": round(float(np.median(total)), 1),
        "p95_ms": round(float(np.quantile(total, 0.95)), 1),
        "max_ms": round(float(total.max()), 1),
        "server_median_ms": round(float(np.median(server)), 1),
        "answer_kb_median": round(float(np.median(n_characters)) / 1000, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy_path", nargs="+", required=True)
    parser.add_argument("--dataset_repo_id", required=True)
    parser.add_argument("--n_poses", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--n_samples", type=int, default=64)
    parser.add_argument("--method", nargs="+", default=["likelihood", "confidence", "recon"])
    parser.add_argument(
        "--attention", nargs="+", default=["rollout", "cross_attention", "relevancy", "grad_cam"]
    )
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--output", default="benchmarks/results/explorer_latency.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = [f"policy {number}" for number in range(len(arguments.policy_path))]
    policies = [load_policy(path) for path in arguments.policy_path]
    explorer = Explorer.open(
        policies, names, arguments.dataset_repo_id, PushTTask, n_samples=arguments.n_samples
    )
    episode, length = sorted(explorer.subjects[0].demonstrations.source.episode_lengths.items())[0]
    asked: dict[str, Any] = {"episode": episode, "frame": length // 3, "horizon": 8}
    load = os.getloadavg()[0]
    found: dict[str, Any] = {}
    with (
        serving(create_app(None, explorer, None)) as address,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(
            executable_path=arguments.chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page()
        page.goto(address)
        recorded = explorer.subjects[0].recorded(
            Question((0,), episode, length // 3, 8, "likelihood")
        )
        assert recorded.simulator_state is not None
        start = recorded.simulator_state[0].tolist()

        def ask(label: str, n_poses: int, **changes: Any) -> None:
            question = {**asked, "method": "likelihood", "attention": "rollout", **changes}
            walk = poses(start, n_poses)
            found[label] = measure(page, [{**question, "pose": pose} for pose in walk])
            print(f"{label:40s} {found[label]}", flush=True)

        for number, name in enumerate(names):
            ask(f"{name}, first answer", 1, policies=[number])
            for attention in arguments.attention:
                label = f"{name}, likelihood and {attention}"
                ask(label, arguments.n_poses, policies=[number], attention=attention)
            for method in arguments.method:
                if method != "likelihood":
                    label = f"{name}, {method} and rollout"
                    ask(label, arguments.n_poses, policies=[number], method=method)
        if len(names) > 1:
            ask("both, likelihood and rollout", arguments.n_poses, policies=[0, 1])
        browser.close()
    explorer.close()
    Path(arguments.output).write_text(
        json.dumps(
            {
                "command": shlex.join(
                    ["python", "-m", "benchmarks.explorer_latency", *sys.argv[1:]]
                ),
                "target_ms": TARGET_MS,
                "n_poses": arguments.n_poses,
                "n_samples": arguments.n_samples,
                "horizon": 8,
                "threads": arguments.threads,
                "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
                "load_before": round(load, 2),
                "load_after": round(os.getloadavg()[0], 2),
                "n_parameters": {
                    name: sum(weight.numel() for weight in policy.view.parameters())  # pyright: ignore[reportAttributeAccessIssue]
                    for name, policy in zip(names, policies, strict=True)
                },
                "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
                "torch": torch.__version__,
                "found": found,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
