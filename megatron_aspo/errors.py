"""The two ways in which a command fails: a mistake of the user's, or a failure that no setting explains."""


class UserError(Exception):
    """A mistake of the user's, as one line that names the setting, the cause and the fix.

    The command line prints it without a traceback and exits with code 2.
    """


class RunError(Exception):
    """A failure after which the run cannot go on, as one line; checkpoints are intact.

    The command line prints it after the traceback of its cause and exits with code 1.
    """
