"""The one exception that stands for bad input: its message is shown to the user as it is, on one line."""


class InputError(ValueError):
  """What was wrong, where, and what to do about it. The CLI prints it and leaves with a non-zero exit code."""
