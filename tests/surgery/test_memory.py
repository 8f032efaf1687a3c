"""How much memory a prune takes beside the model, measured by the operating system in a process of its own."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
from torch import nn
import lightning_prune as lp

def resident(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

torch.set_num_threads(1)
width, layers = 4096, 4  # 64 MiB each, 16 MiB when pruned
model = nn.Sequential(nn.Linear(8, width), *[nn.Sequential(nn.ReLU(), nn.Linear(width, width)) for _ in range(layers)])
model.append(nn.Linear(width, 8))
graph = lp.trace(model, torch.zeros(1, 8))
plan = graph.plan({name: torch.arange(width // 2, width) for name in graph.groups})
lp.prune(nn.Sequential(nn.Linear(8, 8)), graph.plan({}))  # code that is needed once
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
before = resident("VmRSS")
lp.prune(model, plan)
print(resident("VmHWM") - before, resident("VmRSS") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_a_prune_needs_the_pruned_model_beside_the_model():
    given_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed goes back to the system at once
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True, env=given_back
    )
    peak, after = map(float, done.stdout.split())
    assert peak < 4 * 16 + 10  # MiB above the model; what is needed besides is far below 10
    assert after < 0
