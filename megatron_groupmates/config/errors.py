"""The one exception type for mistakes a user can mend."""


class UserError(ValueError):
    """Bad input: a setting, a path or a file.

    The message states what was wrong, the values involved and what to change. Entry points print it
    without a traceback and exit with code 1; every other exception keeps its traceback.
    """
