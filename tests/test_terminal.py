"""`jaxlm chat` in a terminal of its own: answers as they come, ctrl-c, ctrl-d, /reset, /exit."""

import dataclasses
import errno
import fcntl
import io
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from conftest import LLAMA, randomized

from jaxlm import console, interop
from jaxlm.data import template
from jaxlm.data import tokenizer as tok
from jaxlm.errors import InputError

CODE = 'import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from jaxlm import cli; sys.exit(cli.main())'
TEMPLATE = (
  '{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}'
  '{% if add_generation_prompt %}assistant: {% endif %}'
)
CTRL_C, CTRL_D = '\x03', '\x04'
SECONDS = 60.0  # until something awaited is given up
pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='the terminal is made as Linux does')


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  """A folder with a model that says nonsense, and says it without end."""
  vocabulary = tok.train(['user: assistant: what is the capital of France? ' * 9], 280)
  cfg = dataclasses.replace(LLAMA, vocab_size=vocabulary.vocab_size, max_seq_len=1 << 20)
  folder = tmp_path_factory.mktemp('chat') / 'model'
  interop.export(interop.Model(cfg, randomized(cfg), vocabulary, TEMPLATE, {}), folder)
  return folder


class Terminal:
  """A process that has a terminal of its own."""

  def __init__(self, model, *args):
    self.master, slave = os.openpty()
    environment = os.environ | {'XLA_FLAGS': '--xla_backend_optimization_level=0', 'JAX_PLATFORMS': 'cpu'}
    command = [sys.executable, '-c', CODE, 'chat', str(model), '--temperature', '0', *args]
    self.process = subprocess.Popen(
      command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment
    )
    self.slave, self.seen = slave, ''

  def type(self, text):
    os.write(self.master, text.encode())

  def read(self, seconds):
    """What comes next, '' if nothing does in that time, or nothing will."""
    if not select.select([self.master], [], [], seconds)[0]:
      return ''
    try:
      text = os.read(self.master, 1 << 16).decode(errors='replace').replace('\r\n', '\n')
    except OSError as error:
      assert error.errno == errno.EIO  # the other end is closed
      text = ''
    self.seen += text
    return text

  def until(self, what, seconds=SECONDS):
    """All that comes up to and with `what`."""
    found, ends = '', time.monotonic() + seconds
    while what not in found:
      assert time.monotonic() < ends, f'no {what!r} in {seconds} seconds, but {found[-200:]!r}'
      found += self.read(0.1)
    return found

  def send(self, line):
    """Types a line and returns once it was read: a ctrl-c before that takes the line back, and is one at the prompt."""
    self.type(f'{line}\n')
    self.until(f'{line}\n')
    ends = time.monotonic() + SECONDS
    while struct.unpack('i', fcntl.ioctl(self.slave, termios.FIONREAD, b'\0' * 4))[0]:
      assert time.monotonic() < ends, 'the line is not read'
      time.sleep(0.01)
    time.sleep(0.1)  # and out of what reads lines

  def ask(self, question):
    """The whole answer to a question."""
    self.type(f'{question}\n')
    return self.until('\n\n> ').removeprefix(f'{question}\n')

  def leaves(self, seconds=SECONDS):
    """The exit code."""
    code = self.process.wait(seconds)
    while self.read(0.2):
      pass
    assert 'Traceback' not in self.seen and 'jaxlm: ' not in self.seen, self.seen[-2000:]
    return code


@pytest.fixture
def terminal(request, model):
  opened = Terminal(model, *request.param)
  opened.until('> ')
  yield opened
  opened.process.kill()
  opened.process.wait()
  os.close(opened.master)
  os.close(opened.slave)


short, endless = ('--max-new-tokens', '12'), ('--max-new-tokens', '20000')
with_length = lambda length: pytest.mark.parametrize('terminal', [length], indirect=True)


@pytest.mark.slow
@with_length(short)
def test_reset_forgets_and_exit_leaves(terminal):
  first = terminal.ask('what is it?')
  second = terminal.ask('what is it?')
  assert len(first) > 5 and first != second
  terminal.type('/reset\n')
  terminal.until('> ')
  assert terminal.ask('what is it?') == first
  assert terminal.ask('what is it?') == second
  terminal.type('/exit\n')
  assert terminal.leaves() == 0


@with_length(short)
@pytest.mark.parametrize('key', [CTRL_D, CTRL_C])
def test_the_end_of_input_and_ctrl_c_at_the_prompt_leave(terminal, key):
  terminal.ask('what?')
  time.sleep(0.3)  # the prompt is written before the line is awaited: a key in between waits for the next one
  terminal.type(key)
  assert terminal.leaves(20) == 0


@with_length(endless)
def test_ctrl_c_stops_the_answer_and_not_the_program(terminal):
  terminal.send('what is it?')
  pieces = [terminal.read(SECONDS) for _ in range(5)]
  assert all(pieces)  # it streams
  terminal.type(CTRL_C)
  terminal.until(' ...\n\n> ', 20)
  terminal.send('what else is it?')  # is answered too
  assert terminal.read(SECONDS) and terminal.read(SECONDS)
  terminal.type(CTRL_C + CTRL_C)  # in haste
  terminal.until(' ...\n\n> ', 20)
  time.sleep(0.2)
  assert terminal.process.poll() is None
  terminal.type('/exit\n')
  assert terminal.leaves() == 0


@pytest.mark.slow
@with_length(endless)
def test_ctrl_c_at_any_moment_before_the_first_piece(terminal):
  """The template's child starts, the prompt is compiled (each time for a longer one), then the first tokens."""
  for turn, wait in enumerate([0.0, 0.03, 0.1, 0.2, 0.4, 0.8]):
    question = 'what ' * (1 + 70 * turn)
    terminal.send(question)
    time.sleep(wait)
    terminal.type(CTRL_C)
    terminal.until(' ...\n\n> ', 30)
    terminal.type('/reset\n')
    terminal.until('> ')
  terminal.type('/exit\n')
  assert terminal.leaves() == 0


def test_half_an_answer_stays_in_the_history(monkeypatch, capsys):
  """Real signals, to this process; ctrl-c after an answer and before the next line stops nothing."""
  heard = []

  def answer(turn, messages):
    heard.append([dict(message) for message in messages])
    yield ''
    yield f'half {turn}'
    os.kill(os.getpid(), signal.SIGINT)
    yield ' and the rest'
    raise AssertionError

  before = signal.getsignal(signal.SIGINT)
  monkeypatch.setattr(sys, 'stdin', io.StringIO('one\n\ntwo\n/reset\nthree\n'))
  console.conversation(answer, 'be kind')
  system = {'role': 'system', 'content': 'be kind'}
  one = {'role': 'user', 'content': 'one'}
  half = {'role': 'assistant', 'content': 'half 0'}
  assert heard == [
    [system, one],
    [system, one, half, {'role': 'user', 'content': 'two'}],
    [system, {'role': 'user', 'content': 'three'}],
  ]
  assert capsys.readouterr().out == 'half 0 ...\n\nhalf 1 ...\n\nhalf 2 ...\n\n\n'
  assert signal.getsignal(signal.SIGINT) is before


def test_a_message_that_is_refused_is_told_and_taken_back(monkeypatch, capsys):
  heard = []

  def answer(turn, messages):
    heard.append([message['content'] for message in messages])
    if messages[-1]['content'] == 'bad':
      raise InputError('5 + 9 tokens are too many')
    yield 'fine'

  monkeypatch.setattr(sys, 'stdin', io.StringIO('good\nbad\nbetter\n'))
  console.conversation(answer)
  assert heard == [['good'], ['good', 'fine', 'bad'], ['good', 'fine', 'better']]
  assert 'fine\n\n5 + 9 tokens are too many (/reset forgets the conversation)\n\nfine' in capsys.readouterr().out


def test_an_interrupted_template_does_not_answer_for_the_next():
  render = template.Renderer(seconds=20.0)
  assert render('{{ x }}', {'x': 'first'}) == 'first'

  def interrupt(*_):
    raise KeyboardInterrupt

  before = signal.signal(signal.SIGALRM, interrupt)
  signal.setitimer(signal.ITIMER_REAL, 0.2)
  try:
    with pytest.raises(KeyboardInterrupt):
      render('{% for a in range(9999) %}{% for b in range(3000) %}{% endfor %}{% endfor %}late', {})
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
  assert render('{{ x }}', {'x': 'next'}) == 'next'
  render.close()
