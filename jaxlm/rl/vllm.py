"""A vLLM server as the engine of rollouts: weights go to it as a Hugging Face folder, answers come back as tokens.

  jaxlm export runs/sft served
  VLLM_SERVER_DEV_MODE=1 vllm serve served --logprobs-mode processed_logprobs
  jaxlm rl --init runs/sft --engine http://localhost:8000 --importance token ...

It is asked with the key in VLLM_API_KEY, if there is one, and sees the run's folder at the same path (one machine, or a
shared disk). It has to be one whose worker's `reload_weights` takes a `weights_path`, and in its development mode,
which alone has /collective_rpc: let nobody else reach it. Its log-probabilities are those of what was drawn from, after
truncation where there is any, and of another program than the one that trains: `policy/sampler_gap` shows by how much,
`rl.importance` weighs it away. A run with such an engine does not go on bitwise.
"""

import json
import math
import os
import urllib.error
import urllib.request
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxlm import hosts, interop
from jaxlm.errors import InputError
from jaxlm.rl.rollout import Completions, Engine
from jaxlm.sample import Sampling

TIMEOUT = 600.0  # seconds for one answer, and for taking weights over


class Server:
  """A server, and the folder in which the weights lie that it has taken over last.

  Raises InputError, in any of its calls, for a server that is not there, takes too long, refuses or answers nonsense.
  """

  def __init__(self, url: str, folder: str, cfg: Any, tokenizer: Any, *, dtype: Any, timeout: float = TIMEOUT):
    if hosts.count() > 1 or '://' in folder:
      raise InputError('rl.engine: weights are handed over by one process through a folder that the server sees')
    self.url, self.cfg, self.tokenizer, self.dtype = url.rstrip('/'), cfg, tokenizer, dtype
    self.folder, self.timeout = epath.Path(folder).expanduser().resolve(), timeout
    key = os.environ.get('VLLM_API_KEY')
    self._headers = {'Content-Type': 'application/json'} | ({'Authorization': f'Bearer {key}'} if key else {})
    self._handed_over, self._last = 0, lambda: None
    try:
      self.model = str(self._call('/v1/models')['data'][0]['id'])
    except (KeyError, IndexError, TypeError) as error:
      raise InputError(f'rl.engine {self.url}/v1/models: names no model') from error
    if self.folder.exists():  # of a run that was killed
      self.folder.rmtree()

  def hand_over(self, params: Any) -> None:
    """The server has these weights, and nothing cached of others, once this returns. What it has does not go again."""
    first = jax.tree.leaves(params)[0]
    if self._last() is first:
      return
    old, new = (self.folder / str(self._handed_over + i) for i in range(2))
    interop.export(interop.Model(self.cfg, params, self.tokenizer, None, {}), new, dtype=self.dtype)
    self._call('/collective_rpc', {'method': 'reload_weights', 'kwargs': {'weights_path': str(new)}})
    self._call('/reset_prefix_cache', {})
    self._handed_over, self._last = self._handed_over + 1, weakref.ref(first)  # kept alive they would fill the device
    if old.exists():
      old.rmtree()

  def engine(self, *, max_new_tokens: int, sampling: Sampling, stop_ids: Sequence[int], rows: int) -> Engine:
    """An `Engine`, which has `rows` prompts answered at the same time."""
    off = {'top_p': 1.0, 'top_k': 0, 'min_p': 0.0}
    asked: dict[str, Any] = {name: getattr(sampling, f'{name}_B') for name in ('temperature', *off)}
    asked = {name: off[name] if x is None else x for name, x in asked.items()}  # else the model's own config decides
    asked |= {'model': self.model, 'max_tokens': max_new_tokens, 'stop_token_ids': list(map(int, stop_ids))}
    asked |= {'repetition_penalty': 1.0, 'ignore_eos': True, 'logprobs': 1, 'return_token_ids': True, 'n': 1}

    def complete(params: Any, prompts: Sequence[Sequence[int]], seeds: np.ndarray) -> Completions:
      self.hand_over(params)
      shape = len(prompts), max_new_tokens
      found = Completions(
        np.zeros(shape, np.int32),
        np.zeros(shape[0], np.int32),
        np.zeros(shape, np.float32),
        np.zeros(shape, np.float32),
        np.zeros(shape[0], np.bool_),
      )
      bodies = [asked | {'prompt': list(map(int, p)), 'seed': int(s)} for p, s in zip(prompts, seeds, strict=True)]
      with ThreadPoolExecutor(rows) as pool:
        try:
          for m, answer in enumerate(pool.map(lambda body: self._call('/v1/completions', body), bodies)):
            ids, logps, stopped = self._read(answer, max_new_tokens, asked['stop_token_ids'])
            n = len(ids)
            found.tokens_MN[m, :n], found.lengths_M[m], found.stopped_M[m] = ids, n, stopped
            found.logp_MN[m, :n] = found.sampled_logp_MN[m, :n] = logps
        except BaseException:
          pool.shutdown(cancel_futures=True)
          raise
      return found

    return complete

  def _read(self, answer: Any, new: int, stop_ids: Sequence[int]) -> tuple[list[int], list[float], bool]:
    """The tokens of an answer, their log-probabilities, and whether a stop id ended it."""
    try:
      one = answer['choices'][0]
      ids, logps, why = (
        [*map(int, one['token_ids'])],
        [*map(float, one['logprobs']['token_logprobs'])],
        one['finish_reason'],
      )
      known = all(0 <= i < self.cfg.vocab_size for i in ids) and all(map(math.isfinite, logps))
      stopped = why == 'stop' and ids[-1] in stop_ids
      sound = known and 0 < len(ids) == len(logps) <= new and (stopped or (why == 'length' and len(ids) == new))
    except (KeyError, IndexError, TypeError, ValueError):
      sound = False
    if not sound:
      raise InputError(
        f'rl.engine {self.url}/v1/completions: is no answer of token_ids and logprobs: {str(answer)[:200]}'
      )
    return ids, logps, stopped

  def _call(self, path: str, body: Any = None) -> Any:
    """What the server says, as JSON; None where it says nothing."""
    raw = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(self.url + path, raw, self._headers)
    try:
      with urllib.request.urlopen(request, timeout=self.timeout) as answer:
        return json.loads(answer.read() or b'null')
    except urllib.error.HTTPError as error:
      hint = ': start it with VLLM_SERVER_DEV_MODE=1' if error.code == 404 and not path.startswith('/v1') else ''
      said = error.read(300).decode(errors='replace')
      raise InputError(f'rl.engine {self.url}{path}: {error.code} {error.reason}{hint}: {said}') from error
    except (OSError, ValueError) as error:
      raise InputError(f'rl.engine {self.url}{path}: {type(error).__name__}: {error}') from error
