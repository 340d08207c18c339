"""An environment whose observations, actions and rewards can be as odd as people's are."""

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec


class Follow(gymnasium.Env):
    """Shows x in [-1, 1] anew at every step; the reward of action a is 1 - |a - 2 x|."""

    def __init__(self, low=-2.0, high=2.0, offset=0.0, fixed=None, dtype="float32", as_array=False, fails=False):
        """Show offset + x, and `fixed` if there is one; pay arrays if wanted; fail at the first step if wanted."""
        self.action_space = spaces.Box(low, high, (1,), np.dtype(dtype))
        self.observation_space = spaces.Box(-np.inf, np.inf, (1 if fixed is None else 2,), np.float64)
        self.offset, self.fixed, self.as_array, self.fails = offset, fixed, as_array, fails

    def _look(self):
        self.x = self.np_random.uniform(-1, 1)
        return np.array([self.offset + self.x] + ([] if self.fixed is None else [self.fixed]))

    def reset(self, *, seed=None, options=None):
        """Begin."""
        super().reset(seed=seed)
        return self._look(), {}

    def step(self, action):
        """Pay for the distance; an action that is not in the space is a mistake of the caller."""
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        if self.fails:
            raise ValueError("no simulator")
        reward = 1.0 - abs(np.asarray(action, dtype=np.float64) - 2 * self.x)
        return self._look(), reward if self.as_array else float(reward[0]), False, False, {}


def make(steps=10, **how):
    """Return the environment, its episodes cut after so many steps."""
    return gymnasium.make(
        EnvSpec(id="Follow-v0", entry_point="tests.follow:Follow", max_episode_steps=steps, kwargs=how)
    )
