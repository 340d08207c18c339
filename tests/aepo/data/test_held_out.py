"""Episodes on which no stage trains: which they are, and what is measured on them."""

import dataclasses

import numpy as np
import pytest
import torch

from aepo import method_table, methods, pipeline
from aepo.data.transitions import MAX_HELD_OUT
from aepo.errors import DataError
from aepo.stages import critic
from tests.examples import random_transitions

CPU = torch.device("cpu")


def of_episodes(lengths):
    data = random_transitions(sum(lengths))
    return dataclasses.replace(data, episode_ends_E=torch.tensor(lengths).cumsum(0))


@pytest.mark.parametrize(
    ("lengths", "share", "held"),
    [
        ([10] * 20, 0.1, 20),
        ([10] * 20, 0.05, 10),
        ([7, 3], 0.01, 3),
        ([5, 500, 5], 0.3, 500),
    ],
)
def test_whole_episodes_are_held_out_and_none_is_lost(lengths, share, held):
    data = of_episodes(lengths)
    rest = data.hold_out(share)
    assert len(rest.held_out) == held
    assert len(rest) + len(rest.held_out) == len(data)
    for part in (rest, rest.held_out):
        assert set(part.episode_ends_E.diff(prepend=torch.zeros(1, dtype=torch.long)).tolist()) <= set(lengths)
    together = torch.cat([rest.rows_ND, rest.held_out.rows_ND])
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, data.rows_ND.tolist()))
    assert rest.to(CPU).held_out.digest == data.digest
    assert torch.equal(data.hold_out(share).held_out.rows_ND, rest.held_out.rows_ND)


def test_no_more_is_held_out_than_is_needed_and_nothing_of_share_0():
    data = of_episodes([100] * 1000)
    assert len(data.hold_out(0.5).held_out) == MAX_HELD_OUT
    assert data.hold_out(0.0) is data
    with pytest.raises(DataError, match="wanted two"):
        of_episodes([50]).hold_out(0.1)


@pytest.mark.parametrize("method", method_table.presets())
def test_what_is_measured_on_held_out_episodes_changes_no_step(method, tiny_config):
    data = of_episodes([20] * 25).hold_out(0.2)
    blind = dataclasses.replace(data, held_out=None)
    config = tiny_config(method=method)
    seeing, not_seeing = (list(pipeline.train(config, each, device=CPU)) for each in (data, blind))
    found = {}
    for one, other in zip(seeing, not_seeing, strict=True):
        assert {key: one.metrics[key] for key in other.metrics} == other.metrics
        found |= one.metrics
    checked = {stage.name for stage in methods.find(config.method).stages() if stage.check is not None}
    assert {f"{name}/held_out_loss" for name in checked} <= set(found)
    assert all(np.isfinite(value) for value in found.values())


def test_the_correlation_is_that_of_the_advantage_with_what_was_earned(tiny_config):
    """A Q that knows what is earned has 1; one that has its sign wrong -1; a constant one 0."""
    data = of_episodes([25] * 20).hold_out(0.2)
    config = tiny_config().critic
    states = pipeline.start(tiny_config(), data, CPU)
    ahead = critic.n_step_returns(data.held_out, 25, config.discount)

    class Known(torch.nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def lowest(self, states_BS, actions_BA):
            rows = data.held_out.sample_rows(2048)
            return self.factor * ahead.rewards_N[rows]

    class Zero(torch.nn.Module):
        def forward(self, states_BS):
            return torch.zeros(len(states_BS))

    for factor, wanted in ((1.0, 1.0), (-3.0, -1.0), (0.0, 0.0)):
        states["critic"].q, states["critic"].v = Known(factor), Zero()
        metrics = critic.make_check(config, states, data.held_out)()()
        assert float(metrics["advantage_corr"]) == pytest.approx(wanted, abs=1e-5)
