"""The two ways in which a run ends early: a mistake of the user's, and a failure that no setting is to blame for."""


class UserError(Exception):
    """A mistake of the user's: its message is one line that names the cause and the fix.

    The command line prints the message without a traceback and exits with code 2.
    """


class RunError(Exception):
    """The run cannot go on, and no setting is to blame: the cause in one line, behind the traceback of the
    exception that it was raised from. What has been saved is intact, and the command line ends with exit code 1."""
