"""What a model writes: texts completed by parameters at hand, or by those of a saved run."""

from collections.abc import Sequence
from typing import Any

from jaxlm import hosts, models, sample
from jaxlm.config import Pretrain
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.loops import bases
from jaxlm.models import ModelConfig

SAMPLING = sample.Sampling(temperature_B=0.6, top_p_B=0.9)


def complete(
  cfg: ModelConfig,
  params: Any,
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  key: Any,
  *,
  new: int,
  run: models.Run,
  sampling: sample.Sampling = SAMPLING,
  stop: Sequence[str] = (),
  draft: sample.Lookup | sample.Draft | None = None,
) -> list[str]:
  """What the model writes after each prompt, as text, to the end of a document or before a `stop` string."""
  first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id  # something has to be there to go on from
  ids = [tokenizer.prefix_ids + tokenizer.encode(p) or [first] for p in prompts]
  ends = {'stop_ids': (tokenizer.eos_id,), 'stop': stop, 'tokenizer': tokenizer}
  out = sample.generate(cfg, params, ids, key, max_new_tokens=new, sampling=sampling, run=run, draft=draft, **ends)
  tokens_BN, lengths_B = hosts.read(out.tokens_BN), hosts.read(out.lengths_B)
  texts = [tokenizer.decode(row[:n].tolist()) for row, n in zip(tokens_BN, lengths_B, strict=True)]
  return [text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))] for text in texts]


def load(run: Any) -> tuple[Pretrain, Any, Tokenizer, int]:
  """(config, parameters, tokenizer, step) of a run's newest checkpoint, on one device of this process.

  Its average, where the optimizer keeps one; adapters are on their base. Raises InputError as `bases.newest` does.
  """
  found = bases.newest(run)
  return *bases.read(found), found.tokenizer, found.step
