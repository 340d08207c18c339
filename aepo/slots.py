"""The environments of an evaluation by slot, stepped in this process and in others. No torch.

Slot i lives in process i mod N, where this process is number 0 and the others are started. All of them run the same
`Slots`; what is asked of the others goes through a pipe, and they end when it closes, however this process ended.
"""

import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
import signal
import sys
import time
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from numpy.typing import NDArray

from aepo.console import err
from aepo.data.episodes import accepted, action_bounds, flatten
from aepo.data.library import open_dataset
from aepo.environments import make_environment, register_robotics
from aepo.errors import AEPOError, ConfigError, DataError, ResourceError, TrainingError
from aepo.tasks import ReturnRule

CLOSING_S = 10.0
"""Seconds after which a process that was told to end is killed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnvironmentSpec:
    """All that a process must know to make the environments of an evaluation, and what counts in their episodes."""

    dataset_id: str
    """Minari id; the environment is the one that it names."""
    env_id: str = ""
    """Gymnasium id to make if the data set names none."""
    observation_keys: tuple[str, ...] = ()
    """Entries of a Dict observation, in the order in which they are joined; () = all, sorted."""
    horizon: int = 0
    """Steps of an episode; 0 = the environment's own limit."""
    return_rule: ReturnRule = "sum"
    """What counts in an episode."""


class SlotStep(NamedTuple):
    """What a step did in one slot."""

    state_S: NDArray[np.float64]
    """The observation."""
    return_: float
    """What the return rule has counted in the episode so far."""
    over: bool
    """Whether the episode has ended."""


class Slots:
    """The slots of one process."""

    def __init__(self, spec: EnvironmentSpec):
        """Open the data set; errors as `open_dataset`."""
        self.spec = spec
        self.dataset = open_dataset(spec.dataset_id)
        """The Minari data set."""
        self._returns: dict[int, float] = {}
        self._bounds: tuple[NDArray[Any], NDArray[Any]]
        self.envs: dict[int, gymnasium.Env[Any, Any]] = {}
        """Slot -> its environment, the same for all of its episodes."""
        self.env_id = ""
        """Gymnasium id of the environments, as they themselves say."""

    def make(self, slots: Iterable[int]) -> dict[int, None]:
        """Make the environments of these slots, those that are not there; errors as `make_environment`."""
        for slot in slots:
            if slot not in self.envs:
                env = make_environment(self.dataset, env_id=self.spec.env_id, horizon=self.spec.horizon)
                self.envs[slot], self.env_id = env, env.spec.id if env.spec else ""
                self._bounds = action_bounds(env, name=self.env_id or self.spec.dataset_id)
        return {}

    def reset(self, seeds: Mapping[int, int]) -> dict[int, NDArray[np.float64]]:
        """Begin an episode in each of these slots from its seed; return the first observations, [S] each.

        Raises:
            TrainingError: if an environment fails.
            DataError: if the observation lacks an entry.
        """
        with environment_errors(self.env_id):
            observations = [self.envs[slot].reset(seed=seed)[0] for slot, seed in seeds.items()]
            self._returns |= dict.fromkeys(seeds, 0.0)
            return dict(zip(seeds, self._flatten(observations), strict=True))

    def step(self, actions: Mapping[int, NDArray[Any]]) -> dict[int, SlotStep]:
        """Take an action, [A], in each of these slots, in the environment's type and within its bounds.

        Raises:
            TrainingError: if an environment fails.
            DataError: if it does not report what the return rule counts.
        """
        observations, overs = [], []
        with environment_errors(self.env_id):
            within = accepted(np.stack(list(actions.values())), *self._bounds)  # at once: a clip costs as a small step
            for slot, action in zip(actions, within, strict=True):
                observation, reward, terminated, truncated, info = self.envs[slot].step(action)
                ends = self._count(slot, float(np.asarray(reward).item()), info)
                observations.append(observation)
                overs.append(bool(terminated or truncated or ends))
            return {
                slot: SlotStep(state_S, self._returns[slot], over)
                for slot, state_S, over in zip(actions, self._flatten(observations), overs, strict=True)
            }

    def close(self) -> None:
        """Close the environments."""
        for env in self.envs.values():
            env.close()

    def _count(self, slot: int, reward: float, info: Mapping[str, Any]) -> bool:
        """Add a step to its episode's return; return whether the return rule ends the episode."""
        if self.spec.return_rule == "subtasks":
            if "episode_task_completions" not in info:
                raise DataError(f"the environment {self.env_id} reports no sub-tasks; --set data.return_rule=sum")
            self._returns[slot] = float(len(info["episode_task_completions"]))
            return False
        if self.spec.return_rule == "goal":
            self._returns[slot] = float(reward > 0) if np.isfinite(reward) else reward
            return reward > 0
        self._returns[slot] += reward
        return False

    def _flatten(self, observations: Sequence[Any]) -> NDArray[np.float64]:
        return flatten(_stack(observations), self.spec.observation_keys)


@contextlib.contextmanager
def environment_errors(env_id: str) -> Iterator[None]:
    """Turn what an environment raises into a TrainingError that names it."""
    try:
        yield
    except (AEPOError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # which an environment's own code may raise
        raise TrainingError(f"the environment {env_id} failed: {type(error).__name__}: {error}") from error


def _stack(observations: Sequence[Any]) -> Any:
    first = observations[0]
    if isinstance(first, dict):
        return {key: _stack([observation[key] for observation in observations]) for key in first}
    if isinstance(first, tuple):
        return tuple(map(_stack, zip(*observations, strict=True)))
    return np.stack(observations)


class SharedSlots:
    """All slots of an evaluation, shared among processes that are started when they are first needed."""

    def __init__(self, spec: EnvironmentSpec, *, processes: int = 1):
        """Open the data set here; errors as `open_dataset`.

        Args:
            spec: what the slots are.
            processes: how many step the environments, this one among them, >= 1.

        Raises:
            ConfigError: for a number below 1.
        """
        if processes < 1:
            raise ConfigError(f"evaluation wants at least 1 process, got {processes}")
        self._spec, self._num = spec, processes
        self.own = Slots(spec)
        self.workers: list[Worker] = []
        self.start_s = 0.0
        """Seconds that starting processes has taken."""

    def make(self, num_slots: int) -> None:
        """Have the environments of the slots 0 to num_slots - 1; start processes for them, if they are missing.

        Raises:
            ResourceError: if an environment cannot be made here, or a process was killed.
            TrainingError: if a process ended.
        """
        self._start(min(self._num, num_slots))
        self._call("make", dict.fromkeys(range(num_slots)))

    def reset(self, seeds: Mapping[int, int]) -> dict[int, NDArray[np.float64]]:
        """Do as `Slots.reset`, and raise as `make`, too."""
        return self._call("reset", seeds) if seeds else {}

    def step(self, actions: Mapping[int, NDArray[Any]]) -> dict[int, SlotStep]:
        """Do as `Slots.step`, and raise as `make`, too."""
        return self._call("step", actions)

    def stop(self) -> None:
        """End the other processes; `make` starts them again."""
        for worker in self.workers:
            worker.hang_up()
        for worker in self.workers:
            worker.join()
        self.workers.clear()

    def close(self) -> None:
        """Close the environments and end the other processes."""
        self.stop()
        self.own.close()

    def _start(self, num: int) -> None:
        """Have `num` processes, this one counted."""
        if num <= len(self.workers) + 1:
            return
        begin = time.monotonic()
        new = [Worker(self._spec, f"evaluation process {i + 1}") for i in range(len(self.workers) + 1, num)]
        self.workers += new
        for worker in new:
            worker.receive()
        seconds = time.monotonic() - begin
        self.start_s += seconds
        err.print(f"{num} evaluation processes, started in {seconds:.1f} s")

    def _call(self, method: str, arguments: Mapping[int, Any]) -> dict[int, Any]:
        """Call a method of `Slots` in every process with the arguments of its own slots; return the answers of all."""
        shares: list[dict[int, Any]] = [{} for _ in range(self._num)]
        for slot, argument in arguments.items():
            shares[slot % self._num][slot] = argument
        asked = [(worker, share) for worker, share in zip(self.workers, shares[1:], strict=False) if share]
        for worker, share in asked:
            worker.send(method, share)
        answers: dict[int, Any] = getattr(self.own, method)(shares[0]) if shares[0] else {}
        for worker, _ in asked:
            answers |= worker.receive()
        return answers


class Worker:
    """Another process with slots, seen from the one that started it."""

    def __init__(self, spec: EnvironmentSpec, name: str):
        """Start it; the first `receive` waits until it is ready."""
        context = multiprocessing.get_context("spawn")  # a fork would have torch's threads without their locks' owners
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, spec, _float_modes()), name=name, daemon=True)
        with _nothing_to_import():
            self._process.start()
        theirs.close()

    @property
    def pid(self) -> int | None:
        """Number of the process."""
        return self._process.pid

    def send(self, method: str, argument: Mapping[int, Any]) -> None:
        """Ask for a call of a method of `Slots`; errors as `receive`, if the process has ended."""
        try:
            self._connection.send((method, argument))
        except OSError as error:
            raise self._obituary() from error

    def receive(self) -> Any:
        """Return what the call that was asked for gave, or raise what it raised.

        Raises:
            ResourceError: if the process was killed.
            TrainingError: if it has ended otherwise.
        """
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._obituary() from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def hang_up(self) -> None:
        """Let the process end."""
        self._connection.close()

    def join(self) -> None:
        """Wait for its end."""
        self._process.join(CLOSING_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _obituary(self) -> AEPOError:
        """Return the error that says how the process ended."""
        self._process.join(CLOSING_S)
        name, status = f"{self._process.name} (process id {self.pid})", self._process.exitcode
        if status == -signal.SIGKILL:
            return ResourceError(
                f"{name} was killed (SIGKILL), as Linux does where memory runs out; free memory or take fewer "
                "--eval-processes (of a sweep: --cpus), then repeat (a sweep with --retry-failed)"
            )
        how = signal.Signals(-status).name if status is not None and status < 0 else f"exit status {status}"
        return TrainingError(
            f"{name} has ended ({how}) in the midst of an evaluation; what it said stands on standard error; "
            "--eval-processes 1 (of a sweep: --cpus 1) does without it"
        )


def serve(connection: Connection, spec: EnvironmentSpec, float_modes: bytes) -> None:
    """Answer calls of a process's slots until the other end of the pipe closes; what a `Worker` executes.

    Args:
        connection: brings a method of `Slots` with its argument, takes its value or what it raised; the first message,
            unasked for, says that the process is ready.
        spec: what the slots are.
        float_modes: what `_float_modes` gave where the others are.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the first one decides
    os.dup2(2, 1)  # standard output is for results
    slots: Slots | None = None
    with contextlib.suppress(EOFError, OSError):  # nobody is at the other end any more
        try:
            slots, ready = Slots(spec), None
            register_robotics()
        except (Exception, SystemExit) as error:
            ready = _sendable(error)
        ctypes.CDLL(None).fesetenv(float_modes)
        connection.send(ready)
        while True:
            method, argument = connection.recv()
            try:
                answer = getattr(slots, method)(argument)
            except (Exception, SystemExit) as error:
                answer = _sendable(error)
            connection.send(answer)
    if slots is not None:
        slots.close()


def _sendable(error: BaseException) -> Exception:
    """Return an error as it can be sent: others than these may not survive it."""
    if isinstance(error, AEPOError | MemoryError | OSError):
        return error
    return TrainingError(f"an environment cannot be made: {type(error).__name__}: {error}")


def _float_modes() -> bytes:
    """Return how this thread computes: how it rounds, and whether it takes subnormal numbers for 0 (C's fenv_t).

    Torch's `set_flush_denormal` does the latter where a run trains; Pen's observations have other bits without it.
    """
    modes = ctypes.create_string_buffer(256)  # 32 bytes on x86-64, 8 on ARM
    ctypes.CDLL(None).fegetenv(modes)
    return modes.raw


@contextlib.contextmanager
def _nothing_to_import() -> Iterator[None]:
    """Keep a process that is started from importing the user's script, which may load torch or start others itself."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
