"""The two exceptions that end a command on purpose, their messages shown as they are, and the checks of numbers."""

LONGEST = 1000  # characters of a message


class InputError(Exception):
  """What was wrong, where, and what to do about it. The CLI prints it and leaves with a non-zero exit code.

  It is one line of printable characters, however a file that it quotes was made.
  """

  def __init__(self, line: str):
    line = line if len(line) <= LONGEST else f'{line[: LONGEST - 4]} ...'
    super().__init__(''.join(c if c.isprintable() else repr(c)[1:-1] for c in line))


class Stopped(Exception):
  """A run that was asked to stop, and saved first: the same command continues it. The exit code is `code`."""

  code = 75  # EX_TEMPFAIL of sysexits.h: not done, and worth trying again


def at_least(least: int, group: str = '', **values: int | None) -> None:
  """Raises InputError, naming it (as 'GROUP.NAME' in a group), if one of the values is smaller than `least`."""
  for name, value in values.items():
    if isinstance(value, int) and value < least:  # another type is the type check's to name
      raise InputError(f'{group}{"." * bool(group)}{name}={value} must be at least {least}')


def within(interval: str, group: str = '', **values: float | None) -> None:
  """Raises InputError, as `at_least`, if one of the values is NaN or outside an interval such as '[0, 1)'."""
  low, high = map(float, interval[1:-1].split(','))
  for name, value in values.items():
    if not isinstance(value, (int, float)):
      continue
    above = value >= low if interval[0] == '[' else value > low
    below = value <= high if interval[-1] == ']' else value < high
    if not (above and below):
      raise InputError(f'{group}{"." * bool(group)}{name}={value} must be in {interval}')
