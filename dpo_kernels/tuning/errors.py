"""What the tuner raises."""


class TuningError(ValueError):
    """Something that the user can set right, in one line."""
