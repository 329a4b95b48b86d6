"""Instruction tuning against transformers: the loss on the same ids and labels, and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import interop, objectives, tree
from jaxlm.interop.families import FAMILIES
from jaxlm.models import Run

torch = pytest.importorskip('torch', reason="needs pip install -e '.[parity]'")
transformers = pytest.importorskip('transformers', reason="needs pip install -e '.[parity]'")

V, B, T = 131, 3, 17
SIZES = {'vocab_size': V, 'hidden_size': 42, 'intermediate_size': 53, 'num_hidden_layers': 3, 'num_attention_heads': 3}
SIZES |= {'num_key_value_heads': 1, 'max_position_embeddings': 97, 'pad_token_id': 0}


def test_loss_and_gradients_of_masked_turns(tmp_path):
  """Rows padded on the right, with turns that are not learned in between: holes in the mask."""
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
  model.save_pretrained(tmp_path)
  rng = np.random.default_rng(0)
  ids, lengths = rng.integers(3, V, (B, T + 1)), np.array([18, 13, 16])
  real = np.arange(T + 1) < lengths[:, None]
  learned = real & (rng.random((B, T + 1)) < 0.4)
  labels = np.where(learned, ids, -100)
  out = model(torch.tensor(ids), attention_mask=torch.tensor(real.astype(int)), labels=torch.tensor(labels))
  out.loss.backward()

  ours = interop.load(str(tmp_path))
  batch = {'tokens': ids[:, :-1], 'targets': ids[:, 1:], 'segment_ids': real[:, :-1], 'target_bytes': learned[:, 1:]}
  batch = {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}
  batch |= {'positions': jnp.broadcast_to(jnp.arange(T), (B, T)), 'loss_mask': jnp.asarray(learned[:, 1:], jnp.float32)}
  for chunks in (1, 8):
    loss_fn = objectives.next_token(ours.cfg, Run(), chunks=chunks)

    def mean(params, loss_fn=loss_fn):
      loss, _ = loss_fn(params, batch, jax.random.key(0))
      return loss.total / loss.weight

    loss, grads = jax.jit(jax.value_and_grad(mean))(ours.params)
    assert float(loss) == pytest.approx(out.loss.item(), rel=1e-5)
    theirs = dict(model.named_parameters())
    for path, grad in tree.items(grads):
      stored = FAMILIES['llama'].names[path]
      layered = '{i}' in stored.name
      names = [stored.name.format(i=i) for i in range(ours.cfg.n_layers if layered else 1)]
      turned = [theirs[name].grad.numpy().T if stored.transposed else theirs[name].grad.numpy() for name in names]
      want = np.stack(turned) if layered else turned[0]
      filled = {'head': (..., slice(V)), 'embed': slice(V)}.get(path, ...)  # what the vocabulary is filled up with
      got = np.asarray(grad)[filled]
      np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max() + 1e-9, err_msg=path)
