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
    """Too little memory, too few cores, or a program that this machine lacks."""

    exit_status = 6


class Interrupted(Exception):  # no error: the run goes on when it is started again
    """A run that was asked to stop; its checkpoint is stored."""


class IncompleteError(AEPOError):
    """A sweep or a report in which planned runs failed or are missing."""

    exit_status = 3
