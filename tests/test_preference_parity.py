"""The stages against TRL's own trainers: the whole objective on the same ids and masks, and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import preferred
import pytest

from jaxlm import interop, models, objectives, tree
from jaxlm.data import pairs
from jaxlm.interop.families import FAMILIES
from jaxlm.models import Run

torch = pytest.importorskip('torch', reason="needs pip install -e '.[parity]'")
transformers = pytest.importorskip('transformers', reason="needs pip install -e '.[parity]'")
trl = pytest.importorskip('trl', reason='needs trl beside the parity extra')
datasets = pytest.importorskip('datasets', reason='needs trl beside the parity extra')

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')  # their own
SIZES = {'hidden_size': 42, 'intermediate_size': 53, 'num_hidden_layers': 3, 'num_attention_heads': 3}
SIZES |= {'num_key_value_heads': 1, 'max_position_embeddings': 401}
ROWS = 5


@pytest.fixture(scope='module')
def setting(tmp_path_factory):
  """A folder of pairs, one of labels, the tokenizer as transformers has it, and two tiny models as folders."""
  home = tmp_path_factory.mktemp('parity')
  rows = preferred.rows(ROWS)
  found = {'pairs': preferred.folder(home, rows, 'pairs')}
  found['labels'] = preferred.folder(home, preferred.labelled(rows), 'labels')
  own = found['pairs'].tokenizer
  names = {f'{role}_token': own.names[role] for role in ('eos', 'bos', 'pad') if own.names.get(role)}
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_object=own.inner, **({'pad_token': names['eos_token']} | names)
  )
  for seed, name in enumerate(('policy', 'reference')):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
      vocab_size=own.vocab_size, **SIZES, pad_token_id=own.pad_id, initializer_range=0.1
    )
    transformers.LlamaForCausalLM(config).save_pretrained(home / name)
  return home, found, theirs


def parts(folder):
  """(ids before the answer, ids of the answer) of every document, and its label."""
  tokens = folder.split('train')
  starts, firsts = tokens.document_starts().tolist(), pairs.completions(tokens)[:, 0]
  ids = [tokens.read(a, b)[0].tolist() for a, b in zip(starts, starts[1:], strict=False)]
  assert all(tokens.learned(a + n, b).all() for a, b, n in zip(starts, starts[1:], firsts.tolist(), strict=False))
  return [(x[:n], x[n:]) for x, n in zip(ids, firsts, strict=True)], tokens.answers()


def settings(cls, home, **how):
  given = {'use_cpu': True, 'bf16': False, 'fp16': False, 'activation_checkpointing': False, 'report_to': 'none'}
  given |= {'per_device_train_batch_size': 2 * ROWS, 'max_length': None, 'disable_dropout': True}
  return cls(output_dir=str(home / 'trl'), **(given | how))


def theirs(trainer, model, examples):
  """Their loss of a batch, and the gradient of every parameter by its name."""
  model.train()
  model.zero_grad()
  loss = trainer.compute_loss(model, trainer.data_collator(examples))
  loss.backward()
  return loss.item(), {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(grads, want, cfg, vocab):
  """Every gradient within 1e-5 of its largest entry; those of the head that only their model has are named."""
  seen = 0
  for path, grad in tree.items(grads):
    if path == 'value':
      got, wanted = np.asarray(grad), want['score.weight'][0]
    else:
      stored = FAMILIES['llama'].names[path]
      layered = '{i}' in stored.name
      names = [stored.name.format(i=i) for i in range(cfg.n_layers if layered else 1)]
      if names[0] not in want:
        assert path == 'head' and not np.asarray(grad).any()  # a reward model has none
        continue
      turned = [want[name].T if stored.transposed else want[name] for name in names]
      wanted = np.stack(turned) if layered else turned[0]
      got = np.asarray(grad)[{'head': (..., slice(vocab)), 'embed': slice(vocab)}.get(path, ...)]
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max() + 1e-9, err_msg=path)
    seen += 1
  assert seen == len(tree.items(grads)) - ('head' in dict(tree.items(grads)) and 'lm_head.weight' not in want)


def ours(loss_fn, params, stream):
  """Loss and gradients over all rows at once, packed as they are packed."""
  batch = preferred.batch_of(stream)
  assert max(len(stream.units_of(i)) for i in range(len(stream))) > 1 and not stream.dropped

  def mean(params):
    loss, _ = loss_fn(params, batch, None)
    return loss.total / loss.weight

  return jax.jit(jax.value_and_grad(mean))(params)


def referred(ours_, stream, reference):
  """The rows with what the reference makes of their answers."""
  fn = jax.jit(objectives.answers(ours_.cfg, Run(), scored=False))
  stream.reference = np.zeros((stream.count, 2), np.float32)
  for number in range(len(stream)):
    batch = {k: v for k, v in preferred.batch_of(stream, [number]).items() if k != 'ref_logps'}
    units = stream.units_of(number)
    stream.reference[units] = np.stack([x[: len(units)] for x in fn(reference.params, batch)], 1)
  return stream


@pytest.mark.parametrize('name, loss_type', [('dpo', 'sigmoid'), ('ipo', 'ipo')])
def test_dpo_and_ipo(setting, name, loss_type):
  home, found, tokenizer = setting
  load = lambda name: transformers.AutoModelForCausalLM.from_pretrained(home / name, dtype=torch.float32)
  rows = datasets.Dataset.from_list([{'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}] * 3)
  model = load('policy')
  given = {'train_dataset': rows, 'processing_class': tokenizer}
  args = settings(trl.DPOConfig, home, beta=0.3, loss_type=[loss_type])
  trainer = trl.DPOTrainer(model, load('reference'), args=args, **given)
  documents, _ = parts(found['pairs'])
  examples = [
    {'prompt_ids': c[0], 'chosen_ids': c[1], 'rejected_ids': r[1]}
    for c, r in zip(documents[::2], documents[1::2], strict=True)
  ]
  loss, grads = theirs(trainer, model, examples)
  base, reference = interop.load(str(home / 'policy')), interop.load(str(home / 'reference'))
  stream = referred(base, preferred.stream(found['pairs'], 307), reference)
  loss_fn = objectives.preference(base.cfg, Run(), loss=name, beta=0.3, reference='cached')
  got, mine = ours(loss_fn, base.params, stream)
  assert float(got) == pytest.approx(loss, rel=1e-5)
  assert_same(mine, grads, base.cfg, base.cfg.vocab_size)


def test_kto(setting):
  """With the answers that this packing mismatches with prompts given to their collator."""
  home, found, tokenizer = setting
  load = lambda name: transformers.AutoModelForCausalLM.from_pretrained(home / name, dtype=torch.float32)
  rows = datasets.Dataset.from_list([{'prompt': 'a', 'completion': 'b', 'label': i % 2 == 0} for i in range(4)])
  model = load('policy')
  args = settings(trl.KTOConfig, home, beta=0.3, desirable_weight=1.25, train_sampling_strategy='sequential')
  trainer = trl.KTOTrainer(model, load('reference'), args=args, train_dataset=rows, processing_class=tokenizer)
  documents, (labels, _) = parts(found['labels'])
  following = [*documents[1:], documents[0]]
  examples = [
    {'prompt_ids': own[0], 'completion_ids': own[1], 'KL_completion_ids': other[1], 'label': bool(label)}
    for own, other, label in zip(documents, following, labels, strict=True)
  ]
  loss, grads = theirs(trainer, model, examples)
  base, reference = interop.load(str(home / 'policy')), interop.load(str(home / 'reference'))
  stream = referred(base, preferred.stream(found['labels'], 307, unit='single'), reference)
  loss_fn = objectives.preference(base.cfg, Run(), loss='kto', beta=0.3, desirable_weight=1.25, reference='cached')
  got, mine = ours(loss_fn, base.params, stream)
  assert float(got) == pytest.approx(loss, rel=1e-5)
  assert_same(mine, grads, base.cfg, base.cfg.vocab_size)


@pytest.mark.parametrize('margins', [False, True])
def test_reward(setting, margins):
  home, found, tokenizer = setting
  torch.manual_seed(3)
  given = {'num_labels': 1, 'dtype': torch.float32}
  model = transformers.AutoModelForSequenceClassification.from_pretrained(home / 'policy', **given)
  documents, (_, said) = parts(found['pairs'])
  whole = [a + b for a, b in documents]
  examples = [
    {'chosen_ids': c, 'rejected_ids': r} | ({'margin': float(m)} if margins else {})
    for c, r, m in zip(whole[::2], whole[1::2], said[::2], strict=True)
  ]
  args = settings(trl.RewardConfig, home, center_rewards_coefficient=0.07)
  rows = datasets.Dataset.from_list(examples)
  trainer = trl.RewardTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
  loss, grads = theirs(trainer, model, examples)
  base = interop.load(str(home / 'policy'))
  head = jnp.asarray(model.score.weight.detach().numpy()[0])
  params = {**models.with_value(base.cfg, base.params), 'value': head}
  loss_fn = objectives.reward(base.cfg, Run(), center=0.07, margin=float(margins))
  got, mine = ours(loss_fn, params, preferred.stream(found['pairs'], 307, ends=True))
  assert float(got) == pytest.approx(loss, rel=1e-5) and said.any()
  want = {name.replace('model.model.', 'model.'): grad for name, grad in grads.items()}
  assert_same(mine, want, base.cfg, base.cfg.vocab_size)
