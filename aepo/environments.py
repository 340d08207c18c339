"""Environments of evaluation: registering them, making the one that a data set names, reference returns. No torch."""

import contextlib
import dataclasses
import importlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium

from aepo.documents import parse_json
from aepo.errors import DataError, ResourceError
from aepo.tasks import check_references


@dataclasses.dataclass(frozen=True, kw_only=True)
class References:
    """Returns that normalise: score 0 = `random`, 100 = `expert`."""

    random: float
    expert: float

    def score(self, return_: float) -> float:
        """Return the normalized score of a return."""
        return 100.0 * (return_ - self.random) / (self.expert - self.random)


def references(dataset: Any) -> References | None:
    """Return the reference returns in a Minari data set's metadata, None if it has none.

    Raises:
        DataError: unless they are two finite numbers, ascending.
    """
    low, high = (dataset.storage.metadata.get(key) for key in ("ref_min_score", "ref_max_score"))
    if low is None and high is None:
        return None
    try:
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in (low, high)):
            raise TypeError
        refs = References(random=float(low), expert=float(high))
        check_references(dataset.id, refs.random, refs.expert)
    except (TypeError, ValueError, OverflowError):  # a ConfigError is a ValueError
        raise DataError(
            f"{dataset.id}: reference scores {low!r} and {high!r} (ref_min_score, ref_max_score in its metadata), "
            "wanted two finite numbers, ascending, or neither; "
            "mend them, or give --set data.ref_min=LOW data.ref_max=HIGH"
        ) from None
    return refs


def register_robotics() -> None:
    """Register the environments of gymnasium-robotics, if it is there, without its notice about Adroit's rewards.

    What the notice says stands in docs/data.md, where it concerns scores.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("farama_notifications").notifications.pop("gymnasium_robotics", None)
        gymnasium.register_envs(importlib.import_module("gymnasium_robotics"))


def same_environment(one: str, other: str) -> bool:
    """Return whether two Gymnasium ids name the same environment, in any version."""
    return one.rpartition("-v")[0] == other.rpartition("-v")[0]


def make_environment(dataset: Any, *, env_id: str = "", horizon: int = 0) -> gymnasium.Env[Any, Any]:
    """Return a new environment in which a policy of a Minari data set is evaluated, in the maze of the data.

    Args:
        dataset: what `open_dataset` returns.
        env_id: Gymnasium id to make if the data set names no environment.
        horizon: steps of an episode; 0 = the environment's own limit.

    Raises:
        DataError: if neither names one.
        ResourceError: if it cannot be made here.
    """
    kwargs: dict[str, Any] = {"disable_env_checker": True}  # it warns of what does not concern us
    kwargs |= {"max_episode_steps": horizon} if horizon else {}
    register_robotics()
    with warnings.catch_warnings(), own_temporary_folder():
        warnings.filterwarnings("ignore", message=".*is out of date.*")
        warnings.filterwarnings("ignore", message=".*rewards are currently not .*")
        metadata = dataset.storage.metadata
        try:
            if metadata.get("env_spec") is None and metadata.get("eval_env_spec") is None:
                return gymnasium.make(env_id, **kwargs)
            eval_env = not _walls_differ(metadata)
            return dataset.recover_environment(eval_env=eval_env, **kwargs)  # type: ignore[no-any-return]
        except MemoryError:
            raise
        except (Exception, SystemExit) as error:  # of an environment, or of a wrapper which cannot be made again
            if metadata.get("env_spec") is None and not env_id:
                raise DataError(f"{dataset.id} names no environment, so no policy can be evaluated on it") from error
            raise ResourceError(
                f"the environment of {dataset.id} cannot be made here "
                f"({type(error).__name__}: {' '.join(str(error).split())}); "
                f"install what it needs ({metadata.get('requirements') or 'its metadata name no packages'}), "
                "or mend its env_spec"
            ) from error


def _walls_differ(metadata: Mapping[str, Any]) -> bool:
    """Return whether evaluation would be in another maze than the data's (so in Minari's AntMaze, its issue 304)."""
    specs = [parse_json(metadata[name]) for name in ("env_spec", "eval_env_spec") if metadata.get(name)]
    maps = [spec.get("kwargs", {}).get("maze_map") for spec in specs]
    walls = [[[cell == 1 for cell in line] for line in maze_map] for maze_map in maps if maze_map]
    return len(walls) == 2 and walls[0] != walls[1]


@contextlib.contextmanager
def own_temporary_folder() -> Iterator[None]:
    """Let what a maze environment leaves in the temporary folder when it is made (its XML) vanish at once."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="aepo-") as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before
