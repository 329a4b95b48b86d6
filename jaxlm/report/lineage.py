"""Which run came from which: read from configurations, and drawn as a tree with links to the reports that are there."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from jaxlm.files import remote
from jaxlm.report import markup, runs

MOST = 200  # folders that are looked into for runs that came from these
NEAR = ('*/config.json', '*/*/config.json', '*/*/*/config.json')


@dataclasses.dataclass
class Node:
  """A run, or a model of others (then there is no path)."""

  key: str
  path: epath.Path | None
  config: Mapping[str, Any]
  parent: str = ''  # the key of what its first weights are from
  helpers: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # ('reward model', key)


Nodes = dict[str, Node]


def key_of(path: Any) -> str:
  """What names a run's folder, whichever way it is written."""
  return str(path) if remote(path) else os.path.normpath(Path(path).absolute())


def place(path: epath.Path, config: Mapping[str, Any], source: str) -> epath.Path | None:
  """The folder of a run that a config names, also where both were moved together; None if it is no run, or gone.

  `path` is where the folder of that config is now.
  """
  own, candidates = str(config.get('run') or ''), []
  if not remote(path) and not remote(source) and own and Path(own).is_absolute() == Path(source).is_absolute():
    candidates.append(os.path.normpath(Path(path).absolute() / os.path.relpath(source, own)))
  if not source.startswith('hf://'):
    candidates.append(source)
  for one in map(epath.Path, candidates):
    if (one / 'config.json').exists() and ((one / 'checkpoints').exists() or (one / 'metrics.jsonl').exists()):
      return one
  return None


def parent(path: epath.Path, config: Mapping[str, Any]) -> epath.Path | None:
  """The run that another's first weights are from."""
  return place(path, config, config['init']) if config.get('init') else None


def family(paths: Iterable[Any], *, descendants: bool) -> Nodes:
  """These runs with all that they came from; `descendants`: and runs near them on disk that came from one of them."""
  nodes: Nodes = {}
  for path in paths:
    _add(nodes, epath.Path(path))
  if descendants:
    for path in list(_near([node.path for node in nodes.values() if node.path and not remote(node.path)])):
      trial: Nodes = {}
      _add(trial, path)
      if trial.keys() & nodes.keys():
        nodes |= {key: node for key, node in trial.items() if key not in nodes}
  return nodes


def _near(folders: Iterable[epath.Path]) -> Iterable[epath.Path]:
  found: dict[str, epath.Path] = {}
  for folder in map(epath.Path, dict.fromkeys(map(key_of, folders))):
    for config in (*folder.parent.glob(NEAR[0]), *(one for pattern in NEAR for one in folder.glob(pattern))):
      if len(found) < MOST and 'checkpoints' not in config.parts:
        found.setdefault(str(config.parent), config.parent)
  return sorted(found.values())


def _add(nodes: Nodes, path: epath.Path) -> str:
  """The key of a run, which is put into `nodes` with all that it came from."""
  key = key_of(path)
  if key in nodes:
    return key
  config = runs.config(path)
  nodes[key] = node = Node(key, path, config)
  if config.get('init'):
    node.parent = _source(nodes, path, config, config['init'])
  named = [('reward model', one) for one in runs.reward_models(config)]
  named += [('teacher', one) for one in [(config.get('distill') or {}).get('teacher')] if one]
  node.helpers = [(what, _source(nodes, path, config, one)) for what, one in named]
  return key


def _source(nodes: Nodes, path: epath.Path, config: Mapping[str, Any], source: str) -> str:
  there = place(path, config, source)
  if there is not None:
    return _add(nodes, there)
  nodes.setdefault(source, Node(source, None, {}))
  return source


def tree(nodes: Nodes, page: epath.Path, marks: Mapping[str, str], written: Iterable[str] = ()) -> str:
  """The runs as a tree; `marks` is HTML before the names of those that `page` is about, by key.

  `written` are keys of runs whose reports are being written; others are linked to where there is one.
  """
  heads = dict(zip(runs_of(nodes), runs.called([nodes[key].path for key in runs_of(nodes)]), strict=True))
  named = lambda key: heads.get(key) or _foreign(key)
  linked = lambda key: _link(nodes[key], named(key), page, set(written), here=key in marks)

  def item(key: str, above: frozenset[str]) -> str:
    node = nodes[key]
    tag = runs.stage(node.config) or ('a run' if node.path else 'a model of others, or a run that is not there')
    helped = ''.join(f' <small>{what}: {linked(other)}</small>' for what, other in node.helpers)
    own = f'{marks.get(key, "")}{linked(key)} <span class="tag">{markup.escape(tag)}</span>{helped}'
    above |= {key}
    inner = ''.join(item(one, above) for one, child in nodes.items() if child.parent == key and one not in above)
    return f'<li>{own}{f"<ul>{inner}</ul>" if inner else ""}</li>'

  roots = [key for key in nodes if _top(nodes, key) == key]
  return f'<div class="tree"><ul>{"".join(item(key, frozenset()) for key in roots)}</ul></div>'


def _top(nodes: Nodes, key: str) -> str:
  """What a run comes from in the end; of a circle, which only a config that was changed can make, its least key."""
  passed = []
  while key not in passed:
    passed.append(key)
    key = nodes[key].parent or key
  return min(passed[passed.index(key) :])


def runs_of(nodes: Nodes) -> list[str]:
  """The keys of those that are runs."""
  return [key for key, node in nodes.items() if node.path is not None]


def _foreign(source: str) -> str:
  return source if source.startswith('hf://') else '/'.join(source.rstrip('/').split('/')[-2:])


def _link(node: Node, name: str, page: epath.Path, written: set[str], *, here: bool) -> str:
  shown = f'<span class="this">{markup.escape(name)}</span>' if here else markup.escape(name)
  target = None if node.path is None else node.path / 'report.html'
  if target is None or target == page or not (node.key in written or target.exists()):
    return shown
  return f'<a href="{markup.escape(reference(target, page))}">{shown}</a>'


def reference(target: epath.Path, page: epath.Path) -> str:
  """What a link says: relative on a disk, so that pages that are moved together still find each other."""
  if remote(target) or remote(page):
    return str(target)
  return Path(os.path.relpath(key_of(target), Path(key_of(page)).parent)).as_posix()
