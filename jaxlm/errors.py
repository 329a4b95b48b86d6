"""The two exceptions that end a command on purpose; their messages are shown to the user as they are, on one line."""


class InputError(ValueError):
  """What was wrong, where, and what to do about it. The CLI prints it and leaves with a non-zero exit code."""


class Stopped(Exception):
  """A run that was asked to stop, and saved first: the same command continues it. The exit code is `code`."""

  code = 75  # EX_TEMPFAIL of sysexits.h: not done, and worth trying again
