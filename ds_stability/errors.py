"""The errors that a user can meet. Scripts print them as one line, from one rank, and exit with `exit_code`."""

from ds_stability.safe_text import safe_line


class UserError(ValueError):
    """A mistake that the user can mend: says what was given, what is allowed, and which flag or key to change.

    Messages repeat names and values from files, so they are made one printable line here, where none can be missed.
    """

    exit_code = 2
    everywhere = False  # whether every rank has raised it, so that rank 0 speaks for all

    def __init__(self, message: str):
        super().__init__(safe_line(message))


class StabilityConfigError(UserError):
    """The `stability` block, or the DeepSpeed config around it, is wrong."""


class SkippedStepsError(RuntimeError):
    """`max_skipped_steps` optimizer steps in a row had to be skipped because numbers were not finite."""

    exit_code = 3
    everywhere = True


class PeerLostError(RuntimeError):
    """Another rank, or the network to it, was lost in the middle of a run (sysexits.h: EX_UNAVAILABLE)."""

    exit_code = 69
    everywhere = False


class StorageError(RuntimeError):
    """The file system failed while something was written: full, read-only, over quota (sysexits.h: EX_IOERR)."""

    exit_code = 74
    everywhere = False


class ExportError(RuntimeError):
    """The trained model could not be written; its checkpoint is whole (sysexits.h: EX_SOFTWARE)."""

    exit_code = 70
    everywhere = True


class PageError(RuntimeError):
    """The page of an evaluation could not be made; its results are whole (sysexits.h: EX_CANTCREAT)."""

    exit_code = 73
    everywhere = True


class StoppedError(RuntimeError):
    """A signal stopped the run after a whole step, and its checkpoint is saved: start it again (sysexits.h: EX_TEMPFAIL)."""

    exit_code = 75


class AlarmStoppedError(StoppedError):
    """The alarm saw a collapse and its action is to stop; a checkpoint is saved. Starting again alone would not mend it."""

    exit_code = 4
