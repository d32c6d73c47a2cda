"""The one error that a user is meant to see."""


class UserError(Exception):
    """A problem that the user can fix. The message is one line: what, where (file, row, field), what to do.

    The command line prints it as ``error: <message>`` and exits with code 2.
    """


class RowError(UserError):
    """A row of the data that cannot be used: training stops at it, ``dpo check`` counts it and reads on.

    ``problem`` is its name in ``engine.data.lint.PROBLEMS``.
    """

    def __init__(self, problem: str, message: str):
        super().__init__(message)
        self.problem = problem
