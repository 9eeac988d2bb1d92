"""The errors that a user can meet. Scripts print them as one line, from one rank, and exit with `exit_code`."""


class UserError(ValueError):
    """A mistake that the user can mend: says what was given, what is allowed, and which flag or key to change."""

    exit_code = 2


class StabilityConfigError(UserError):
    """The `stability` block, or the DeepSpeed config around it, is wrong."""


class SkippedStepsError(RuntimeError):
    """`max_skipped_steps` optimizer steps in a row had to be skipped because numbers were not finite."""

    exit_code = 3
