"""The one error that a user is meant to see."""


class UserError(Exception):
    """A problem that the user can fix. The message is one line: what, where (file, row, field), what to do.

    The command line prints it as ``error: <message>`` and exits with code 2.
    """
