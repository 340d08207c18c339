"""The toy bench: its sets, its distance, and that the targets do there what the exact answer says."""

import json

import numpy as np
import pytest
import torch

from aepo import cli, toy


@pytest.mark.parametrize("name", toy.SETS)
def test_sets_fill_the_action_range_and_have_a_smooth_q(name):
    density, q = toy.SETS[name]
    points = density(20_000, torch.Generator().manual_seed(0))
    assert points.shape == (20_000, 2)
    assert 0.7 < points.abs().max() <= 1
    assert (points.abs() == 1).float().mean() < 0.01, "clipping moves no mass worth speaking of"
    points = points[:100].requires_grad_()
    (slope,) = torch.autograd.grad(q(points).sum(), points)
    assert torch.isfinite(slope).all()
    assert slope.abs().sum() > 0


def test_distance_of_shifted_and_scaled_gaussians_is_the_closed_form():
    """Every projection of N(m, s^2 I) is N(m.u, s^2), so the mean over directions of W2^2 is |m|^2/2 + (s - 1)^2."""
    first = torch.randn(50_000, 2, generator=torch.Generator().manual_seed(0))
    second = 1.5 * torch.randn(50_000, 2, generator=torch.Generator().manual_seed(1)) + torch.tensor([0.6, -0.8])
    assert toy.sliced_wasserstein(first, second) == pytest.approx(np.sqrt(0.5 + 0.25), abs=0.02)
    assert toy.sliced_wasserstein(first, first) == 0


def test_the_bench_writes_rows_and_plots(tmp_path, capsys):
    argv = ["toy", "--sets", "moons", "--steps", "300", "--betas", "1", "--out", str(tmp_path), "--json"]
    assert cli.run([*argv, "--targets", "closed_form", "analytic/data_action", "log_expectation"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["target"] for row in rows] == ["none", "closed_form", "analytic/data_action", "log_expectation"]
    assert all(set(row) == {"set", "beta", "target", "distance", "floor"} for row in rows)
    assert all(0 < row["floor"] < row["distance"] for row in rows)
    for row in rows[1:3]:
        assert row["distance"] < rows[0]["distance"], "on this set Q is linear: guidance must help"
    assert (tmp_path / "moons.png").stat().st_size > 10_000


@pytest.mark.parametrize("flags", [["--sets", "moon"], ["--targets", "exact"], ["--betas", "0"], ["--betas", "99"]])
def test_what_the_bench_does_not_know_is_refused(flags, capsys):
    assert cli.run(["toy", *flags]) == 2
    assert "error:" in capsys.readouterr().err
