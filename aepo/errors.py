"""What can go wrong, each with the exit status that the command line returns for it.

Every message says what was got, what was wanted and what to do next, in one line.
"""

import errno
import os

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors of a full disk, a quota, or a limit on the size of files."""
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Numbers of the errors of files that are another user's, or on a disk that may only be read."""
MISPLACED = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
"""Numbers of the errors of a path that cannot be what it was to be, such as a file below a file."""


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
    """Too little memory or space, too few cores, or a program, a file or a permission that this machine lacks."""

    exit_status = 6


class BusyError(ResourceError):
    """A folder in which another process is at work; nothing in it was touched."""


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


def lacks_space(error: BaseException) -> bool:
    """Return whether something could not be written for want of space.

    HDF5 and safetensors write by themselves and raise types of their own, with the system's words in the text.
    """
    return getattr(error, "errno", None) in NO_SPACE or any(os.strerror(code) in str(error) for code in NO_SPACE)


def from_machine(error: BaseException) -> AEPOError | None:
    """Return in one line what the machine has refused: memory, space, a file; None for an error of another kind."""
    if is_out_of_memory(error):
        return ResourceError(
            f"out of memory: {' '.join(str(error).split())[:200] or 'nothing more is known'}; "
            "end other programs or take a larger machine"
        )
    if not isinstance(error, OSError):
        return None
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    what = " ".join((error.strerror or str(error)).split())[:200]
    if lacks_space(error):
        return ResourceError(f"{where}{what}; make room, then give the same command again")
    if where and error.errno in FORBIDDEN:
        return ResourceError(f"{where}{what}; name a place that this user may write to")
    if where and error.errno in MISPLACED:
        return ConfigError(f"{where}{what}; name another place")
    return ResourceError(f"{where}{what}") if where else None
