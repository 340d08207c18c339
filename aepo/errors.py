"""What can go wrong, each with the exit status that the command line returns for it.

Every message says what was got, what was wanted and what to do next, in one line.
"""


class AEPOError(Exception):
    """A failure that the user can understand and mend; the base of all others."""

    exit_status = 1


class ConfigError(AEPOError, ValueError):
    """A setting that is unknown, out of range or contradicts another."""

    exit_status = 2


class DataError(AEPOError):
    """A data set that is missing, broken or of a kind that the method cannot use."""

    exit_status = 3


class CheckpointError(AEPOError):
    """A checkpoint or policy file that is torn, foreign or of another run."""

    exit_status = 4


class TrainingError(AEPOError):
    """A run that ended without a policy: a loss that is not finite, an environment that crashed."""

    exit_status = 5


class ResourceError(AEPOError):
    """Too little memory, too few cores, a file that this machine does not give, or a program that it lacks."""

    exit_status = 6


class Interrupted(Exception):  # no error: the run goes on when it is started again
    """A run that was asked to stop; its checkpoint is stored."""


class IncompleteError(AEPOError):
    """A sweep or a report in which planned runs failed or are missing."""

    exit_status = 3


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is that memory was asked for and not given; torch has no type for it on the CPU."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(
            words in said for words in ("allocate memory", "out of memory", "not enough memory", "size calculation")
        )
    )


def from_machine(error: BaseException) -> ResourceError | None:
    """Return in one line what the machine has refused: memory, a file, a folder; None for an error of another kind."""
    if is_out_of_memory(error):
        return ResourceError(f"out of memory: {' '.join(str(error).split())[:200] or 'nothing more is known'}")
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename is not None else ""
        return ResourceError(f"{place}{' '.join(error.strerror.split())[:200]}")
    return None
