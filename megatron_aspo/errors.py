"""The one exception for mistakes a user can make."""


class UserError(Exception):
    """A mistake of the user's: its message is one line that names the cause and the fix.

    The command line prints the message without a traceback and exits with code 2.
    """
