"""Which documents are kept, why the others are not, and in which split a document is."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from etils import epath

from jaxlm.data import neardup, sources
from jaxlm.data.quality import Thresholds, fault
from jaxlm.data.sources import Document
from jaxlm.errors import InputError

SPLITS = ('train', 'validation')
EMPTY, DUPLICATE, POOR, NEAR = 'empty', 'duplicate', 'quality', 'near-duplicate'  # why a document was left out


class Kept(NamedTuple):
  """A document that stays: its split, and its number among all that stay."""

  split: str
  number: int
  document: Document


class Rules(NamedTuple):
  """What is left out beside empty documents and exact duplicates."""

  near: float | None = None  # what is that similar to a document kept before (see `neardup`)
  quality: Thresholds | None = None  # what has a fault (see `quality`)

  @property
  def reasons(self) -> list[str]:
    """Why a document may be left out, in the order of the summary."""
    return [DUPLICATE, EMPTY, *[POOR] * (self.quality is not None), *[NEAR] * (self.near is not None)]


def digest_of(text: str) -> bytes:
  """The sha256 of a text, which says its split and, by its first half, what it is a duplicate of."""
  return hashlib.sha256(text.encode()).digest()


def split_of(digest: bytes, val_fraction: float) -> str:
  """'train' or 'validation' from the sha256 of a text; a larger fraction only adds to validation."""
  return 'validation' if int.from_bytes(digest[:8], 'big') < val_fraction * 2**64 else 'train'


class Choice:
  """Decides document by document, in their order; `dropped` counts what was left out: {reason: {kind: documents}}.

  A document counts under the first reason that holds: empty, the text of one kept before, a fault, similar to one kept
  before. `beam_steps` decides the same for documents that lie on many machines.
  """

  def __init__(self, val_fraction: float, rules: Rules = Rules()):
    self.val_fraction, self.rules = val_fraction, rules
    self.dropped = {reason: Counter[str]() for reason in rules.reasons}
    self._similar = None if rules.near is None else neardup.NearDuplicates(rules.near)
    self._seen: set[bytes] = set()

  def kept(self, documents: Iterable[Document]) -> Iterator[Kept]:
    for document in documents:
      digest = digest_of(document.text)
      if reason := self._fault(document.text, digest[:16]):
        self.dropped[reason][document.kind] += 1
      else:
        yield Kept(split_of(digest, self.val_fraction), len(self._seen), document)
        self._seen.add(digest[:16])

  def _fault(self, text: str, identity: bytes) -> str | None:
    if not text.strip():
      return EMPTY
    if identity in self._seen:
      return DUPLICATE
    if self.rules.quality and fault(text, self.rules.quality):
      return POOR
    return NEAR if self._similar and self._similar.seen(text) else None


class Quarantine:
  """Counts the bad records that were left out, lists them in `path` if there is one; refuses what is past `limit`."""

  def __init__(self, path: epath.Path | None = None, limit: int = 0):
    self.path, self.limit, self.counts = path, limit, Counter[str]()

  def of(self, kind: str) -> sources.OnBad:
    """What to do with a bad record of this kind."""
    return lambda error: self._add(error, kind)

  def _add(self, error: InputError, kind: str) -> None:
    self.counts[kind] += 1
    if self.counts.total() > self.limit:
      count = f'{self.counts.total()} bad records are more than max_bad={self.limit}'
      raise InputError(f'{count}; the last is {error}' if self.limit else str(error))
    if self.path:
      with self.path.open('a') as file:
        file.write(json.dumps({'why': str(error)}, ensure_ascii=False) + '\n')
