"""The ledger: floating-point operations are counted, a multiply-add as two."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gan3d.cost import Cost, count_flops


@pytest.mark.smoke
def test_a_linear_layer_costs_two_operations_per_weight_and_row():
    layer, rows = nn.Linear(30, 50), torch.randn(7, 30)
    assert count_flops(lambda: layer(rows)) == 2 * 7 * 30 * 50


def test_a_convolution_costs_two_operations_per_tap_and_output():
    layer, images = nn.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 10, 12)
    assert count_flops(lambda: layer(images)) == 2 * 2 * 10 * 12 * 8 * 3 * 9


def test_counting_leaves_no_graph_and_counts_each_run_alone():
    layer, rows = nn.Linear(4, 4), torch.randn(1, 4)
    outputs = []
    first = count_flops(lambda: outputs.append(layer(rows)))
    assert count_flops(lambda: outputs.append(layer(rows))) == first == 32
    assert not outputs[0].requires_grad


def test_a_frame_costs_rays_times_samples_times_work_and_what_is_fixed():
    assert Cost(rays=64 * 64, samples_per_ray=24.0, flops_per_sample=1000.0, flops_fixed=5e6).flops == 98_304_000 + 5e6


def test_the_first_count_of_a_process_knows_our_own_ops() -> None:
    """They are loaded on first use, and a counter only knows what was there when it was made."""
    code = ("import torch; from gan3d import ops; from gan3d.cost import count_flops; "
            "print(count_flops(lambda: ops.tiny_mlp(torch.zeros(10, 4), torch.zeros(20), (4, 4, 1), False, 'relu')))")
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == str(10 * 2 * (4 * 4 + 4)), done.stderr
