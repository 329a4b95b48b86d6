"""A small chat model in a folder, and `jaxlm serve` of it as a process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tiny_run import SOURCE, quick

from jaxlm import interop, lora, models
from jaxlm.data import chat, sources, tokenizer, turns
from jaxlm.interop import peft
from jaxlm.models import LowRank, ModelConfig

CFG = ModelConfig(d_model=56, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=70, vocab_size=311, max_seq_len=512)


def model() -> interop.Model:
  """Random weights, large enough that answers differ; a vocabulary of the shipped text, and ChatML."""
  words = tokenizer.train((d.text for d in sources.documents((SOURCE,))), 307)
  words = words.with_controls(turns.BUILT_IN['chatml'])
  template = (turns.ASSETS / 'chatml.jinja').read_text()
  shapes = jax.eval_shape(lambda: models.init(CFG, jax.random.key(0)))
  leaves, treedef = jax.tree.flatten(shapes)
  rng = np.random.default_rng(5)
  params = jax.tree.unflatten(treedef, [jnp.asarray(rng.normal(0.0, 0.3, x.shape), jnp.float32) for x in leaves])
  ends = [words.eos_id, words.control_id('<|im_end|>')]
  return interop.Model(CFG, params, words, template, {'eos_token_id': ends})


def reciting(text: str, messages: list[dict[str, str]], length: int = 640) -> interop.Model:
  """A model that answers these messages with the text: what comes next is a matter of the position alone."""
  made = model()
  words = made.tokenizer
  asked = chat.encode(made.chat_template, messages, words, generation=True)
  said = [*words.encode(text), words.control_id('<|im_end|>')]
  sizes = {
    'd_model': length,
    'n_layers': 1,
    'n_heads': 4,
    'd_ff': 8,
    'vocab_size': CFG.vocab_size,
    'max_seq_len': length,
  }
  kind = {'norm': 'layernorm', 'activation': 'gelu_tanh', 'gated_mlp': False, 'positions': 'learned', 'bias': True}
  cfg = ModelConfig(**sizes, **kind, tie_embeddings=False)
  shapes = jax.eval_shape(lambda: models.init(cfg, jax.random.key(0)))
  params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
  params['final_norm']['scale'][:] = 1.0
  params['positions'][:] = np.eye(length)
  params['head'][np.arange(len(asked) - 1, len(asked) - 1 + len(said)), said] = 1.0
  return made._replace(cfg=cfg, params=jax.tree.map(jnp.asarray, params))


def adapter(made: interop.Model, folder: Path) -> interop.Model:
  """Writes an adapter of the model that changes what it says; the model with it."""
  params = lora.init(jax.random.key(1), made.params, rank=3, alpha=6)
  moved = lambda x: x.replace(b=jax.random.normal(jax.random.key(2), x.b.shape)) if isinstance(x, LowRank) else x
  params = jax.tree.map(moved, params, is_leaf=lambda x: isinstance(x, LowRank))
  peft.export(made.cfg, params, folder, base='ORG/NAME')
  return made._replace(params=params)


class Server:
  """A process that serves a folder, by the name of 'tiny' if no other is given; `log` is what it said."""

  def __init__(self, folder: Path, home: Path, *flags: str, **env: str):
    named = () if '--name' in flags else ('--name', 'tiny')
    command = [sys.executable, '-m', 'jaxlm', 'serve', str(folder), '--port', '0', *named, *flags]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    self.process = subprocess.Popen(command, env=os.environ | quick(home) | env, **pipes)
    self.log = []
    for line in self.process.stdout:
      self.log.append(line)
      if line.startswith('serving '):
        self.url = line.split(' at ')[1].strip()
        return
    self.process.communicate()
    raise AssertionError(''.join(self.log))

  def stop(self) -> int:
    """Asks it to end, as an init system does; its exit code."""
    if self.process.poll() is None:
      self.process.send_signal(signal.SIGTERM)
    out, _ = self.process.communicate(timeout=120)
    self.log.append(out)
    return self.process.returncode
