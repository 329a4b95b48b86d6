"""Training against transformers and torch's AdamW: the same weights and batches give the same 200 losses."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import GPT2, LLAMA

from jaxlm import program, sharding
from jaxlm.config import Data, Optim, Pretrain

torch = pytest.importorskip('torch', reason="needs pip install -e '.[parity]'")
transformers = pytest.importorskip('transformers', reason="needs pip install -e '.[parity]'")

STEPS, B, T = 200, 5, 23
WIDER = dataclasses.replace(LLAMA, d_model=18)  # transformers wants a multiple of the heads
OPTIM = Optim(lr=4e-3, warmup_steps=11, weight_decay=0.1, clip_norm=1.0)


def llama(cfg, params):
  """A transformers model with these weights."""
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=cfg.vocab_size,
      hidden_size=cfg.d_model,
      intermediate_size=cfg.d_ff,
      num_hidden_layers=cfg.n_layers,
      num_attention_heads=cfg.n_heads,
      num_key_value_heads=cfg.kv_heads,
      head_dim=cfg.head_size,
      rms_norm_eps=cfg.norm_eps,
      rope_theta=cfg.rope_theta,
      tie_word_embeddings=cfg.tie_embeddings,
    )
  )
  layers, V = params['layers'], cfg.vocab_size
  weights = {'model.embed_tokens.weight': params['embed'][:V], 'lm_head.weight': params['head'].T[:V]}
  weights['model.norm.weight'] = params['final_norm']['scale']
  for i in range(cfg.n_layers):
    at = f'model.layers.{i}'
    weights |= {f'{at}.self_attn.{n}_proj.weight': layers['attn'][n][i].T for n in 'qkvo'}
    weights |= {f'{at}.mlp.{n}_proj.weight': layers['mlp'][n][i].T for n in ('up', 'gate', 'down')}
    weights[f'{at}.input_layernorm.weight'] = layers['attn_norm']['scale'][i]
    weights[f'{at}.post_attention_layernorm.weight'] = layers['mlp_norm']['scale'][i]
  return filled(model, weights)


def gpt2(cfg, params):
  """A transformers model with these weights."""
  config = transformers.GPT2Config(
    vocab_size=cfg.vocab_size,
    n_positions=cfg.max_seq_len,
    n_embd=cfg.d_model,
    n_layer=cfg.n_layers,
    n_head=cfg.n_heads,
    n_inner=cfg.d_ff,
    layer_norm_epsilon=cfg.norm_eps,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
  )
  layers = params['layers']
  weights = {'wte.weight': params['embed'][: cfg.vocab_size], 'wpe.weight': params['positions']}
  weights |= {'ln_f.weight': params['final_norm']['scale'], 'ln_f.bias': params['final_norm']['bias']}
  for i in range(cfg.n_layers):
    attn, mlp = (jax.tree.map(lambda x, i=i: x[i], layers[name]) for name in ('attn', 'mlp'))
    weights[f'h.{i}.attn.c_attn.weight'] = np.concatenate([attn[n] for n in 'qkv'], axis=1)
    weights[f'h.{i}.attn.c_attn.bias'] = np.concatenate([attn[f'{n}_bias'] for n in 'qkv'])
    for theirs, ours, where in (('attn.c_proj', 'o', attn), ('mlp.c_fc', 'up', mlp), ('mlp.c_proj', 'down', mlp)):
      weights |= {f'h.{i}.{theirs}.weight': where[ours], f'h.{i}.{theirs}.bias': where[f'{ours}_bias']}
    for theirs, ours in (('ln_1', 'attn_norm'), ('ln_2', 'mlp_norm')):
      weights |= {f'h.{i}.{theirs}.{n}': layers[ours][m][i] for n, m in (('weight', 'scale'), ('bias', 'bias'))}
  model = transformers.GPT2LMHeadModel(config)
  return filled(model, {f'transformer.{name}': x for name, x in weights.items()})


def filled(model, weights):
  state = {name: torch.tensor(np.ascontiguousarray(x)) for name, x in weights.items()}
  missing, unexpected = model.load_state_dict(state, strict=False)
  assert not unexpected and set(missing) <= {'lm_head.weight'}  # tied to the embedding
  return model.train()


def batches(vocab: int):
  """Text that can be learnt (each token follows from the one before) with ragged masks."""
  rng = np.random.default_rng(3)
  follow = rng.permutation(vocab)
  for _ in range(STEPS):
    tokens = np.zeros((B, T + 1), np.int32)
    tokens[:, 0] = rng.integers(vocab, size=B)
    for t in range(T):
      tokens[:, t + 1] = np.where(rng.random(B) < 0.7, follow[tokens[:, t]], rng.integers(vocab, size=B))
    yield tokens[:, :-1], tokens[:, 1:], (rng.random((B, T)) < 0.8).astype(np.float32)


def ours(cfg):
  """(initial parameters, losses, the learning rate by step)."""
  run = Pretrain(model=cfg, data=Data(seq_len=T, global_batch=B), optim=OPTIM, steps=STEPS)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    built = program.build(run, mesh)
    state = built.create()
    first, losses = jax.tree.map(np.array, state.params), []
    for tokens, targets, mask in batches(cfg.vocab_size):
      batch = {'tokens': tokens, 'targets': targets, 'loss_mask': mask, 'segment_ids': np.ones_like(tokens)}
      batch |= {'positions': np.tile(np.arange(T, dtype=np.int32), (B, 1)), 'target_bytes': np.ones_like(tokens)}
      state, metrics = built.step(state, program.put(batch, built.batch))
      losses.append(float(metrics['loss']))
  return first, losses, built.schedule


@pytest.mark.slow
@pytest.mark.parametrize('cfg, convert', [(WIDER, llama), (GPT2, gpt2)], ids=['llama', 'gpt2'])
def test_200_steps_follow_transformers_and_torch_adamw(cfg, convert):
  first, losses, schedule = ours(cfg)
  model = convert(cfg, first)
  decayed = [p for p in model.parameters() if p.ndim > 1]
  spared = [p for p in model.parameters() if p.ndim < 2]
  groups = [{'params': decayed, 'weight_decay': OPTIM.weight_decay}, {'params': spared, 'weight_decay': 0.0}]
  optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=(OPTIM.b1, OPTIM.b2), eps=OPTIM.eps)
  theirs = []
  for step, (tokens, targets, mask) in enumerate(batches(cfg.vocab_size)):
    labels = torch.tensor(np.where(mask > 0, targets, -100)).long()
    logits = model(torch.tensor(tokens).long()).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, cfg.vocab_size), labels.reshape(-1))
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
    for group in optimizer.param_groups:
      group['lr'] = float(schedule(step))
    optimizer.step()
    theirs.append(loss.item())
  worst = np.abs(np.array(losses) - np.array(theirs)).max()
  print(f'{cfg.norm}: largest difference of 200 losses {worst:.2e}, from {theirs[0]:.3f} to {theirs[-1]:.3f}')
  assert worst < 1e-3
  assert np.mean(theirs[-10:]) < 0.85 * theirs[0]  # it did learn: losses that stand still agree too easily
