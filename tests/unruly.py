"""An environment that does as it is told, for the tests of evaluation in several processes, which import it anew."""

import multiprocessing
import os
import signal
import sys
from typing import Any

import gymnasium
import numpy as np

DEED_AT = 3
"""Step of an episode at which it does it."""


class Unruly(gymnasium.Env[Any, Any]):
    """Pays 1 a step; `elsewhere` leaves the process with the tests alone."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (3,))
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (1,))

    def __init__(self, deed: str = "", *, elsewhere: bool = False):
        self._deed = "" if elsewhere and multiprocessing.parent_process() is None else deed
        if self._deed == "refuse":
            raise TypeError("no such maze")
        if self._deed == "leave-early":
            raise SystemExit(3)
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        self._steps = 0
        return np.zeros(3), {}

    def step(self, action):
        self._steps += 1
        reward, observation = 1.0, np.zeros(3)
        if self._deed == "torch":
            reward = float("torch" in sys.modules)
        elif self._deed == "subnormal":
            reward = float(sys.float_info.min / 2 > 0)
        elif self._deed == "print":
            print("out of turn")
        elif self._steps == DEED_AT:
            if self._deed == "raise":
                raise ZeroDivisionError("in the simulator")
            if self._deed == "memory":
                raise MemoryError("no 3 GiB")
            if self._deed == "disk":
                raise OSError(5, "Input/output error")
            if self._deed == "exit":
                os._exit(3)
            if self._deed == "leave":
                raise SystemExit(0)
            if self._deed == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            observation = np.full(3, np.nan) if self._deed == "nan" else observation
        return observation, reward, False, False, {}
