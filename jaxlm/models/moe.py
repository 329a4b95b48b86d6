"""A feed-forward layer of many experts, of which each token goes through a few; no token is dropped.

S tokens, D model, F ffn of an expert, E experts, A assignments (tokens x experts a token).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.models.config import ModelConfig
from jaxlm.models.dispatch import Exchange, exchanged
from jaxlm.models.linear import grouped, linear
from jaxlm.sharding import Rules, own_tokens


def route(
  logits_SE: Float[Array, 'S E'], k: int, normalized: bool, real_S: Bool[Array, ' S'] | None = None
) -> tuple[Int[Array, 'S k'], Float[Array, 'S k'], dict[str, Array]]:
  """`(experts_Sk, weights_Sk, aux)`: the k likeliest experts of each token, weighed by their probability.

  `aux` holds what keeps a router balanced, both means over tokens, of those that are real (None: all): `balance`, E *
  sum over experts of the share of tokens that have it times its mean probability (Fedus et al. 2021, arXiv:2101.03961,
  eq. 4; k where all is even), and `router_z`, the squared log-sum-exp of the logits (Zoph et al. 2022,
  arXiv:2202.08906, eq. 5).
  """
  S, E = logits_SE.shape
  probs_SE = jax.nn.softmax(logits_SE, axis=-1)
  weights_Sk, experts_Sk = jax.lax.top_k(probs_SE, k)
  if normalized:
    weights_Sk /= jnp.sum(weights_Sk, axis=-1, keepdims=True)
  real_S = jnp.ones(S) if real_S is None else real_S.astype(jnp.float32)
  n = jnp.maximum(jnp.sum(real_S), 1.0)
  share_E = jnp.bincount(experts_Sk.reshape(-1), jnp.repeat(real_S, k), length=E) / n  # whole numbers: exact sums
  balance = E * jnp.sum(share_E * jnp.sum(probs_SE * real_S[:, None], axis=0) / n)
  z = jnp.sum(jax.nn.logsumexp(logits_SE, axis=-1) ** 2 * real_S) / n
  return experts_Sk, weights_Sk, {'balance': balance, 'router_z': z}


def mix(
  x_SD: Float[Array, 'S D'],
  experts_Sk: Int[Array, 'S k'],
  weights_Sk: Float[Array, 'S k'],
  weights: Any,
  act: Any,
  exchange: Exchange | None = None,
) -> Float[Array, 'S D']:
  """Each token through its experts: assignments sorted by expert, one grouped matmul a projection, summed by weight.

  `weights` are gate, up [E, D, F] and down [E, F, D]; gate may be None. With `exchange` they are this device's
  part of the experts, and assignments travel to the devices of theirs.
  """
  gate, up, down = weights
  S, k = experts_Sk.shape
  held = jax.tree.leaves(down)[0].shape[0]
  E = held if exchange is None else held * jax.lax.axis_size(exchange.axis)
  order_A = jnp.argsort(experts_Sk.reshape(-1), stable=True)
  sizes_E = jnp.bincount(experts_Sk.reshape(-1), length=E).astype(jnp.int32)
  # permutations there and back: no index twice, so that no order of adding is left to chance, nor in the gradient
  x_AD = jnp.repeat(x_SD, k, axis=0).at[order_A].get(unique_indices=True)

  def fed(x_AD: Array, sizes: Array) -> Array:
    h_AF = grouped(x_AD, up, sizes)
    h_AF = act(h_AF) if gate is None else act(grouped(x_AD, gate, sizes)) * h_AF
    return grouped(h_AF, down, sizes)

  y_AD = fed(x_AD, sizes_E) if exchange is None else exchanged(fed, x_AD, sizes_E, exchange, S * min(k, held))
  y_AD = jnp.zeros_like(y_AD).at[order_A].set(y_AD, unique_indices=True)
  return jnp.sum(y_AD.reshape(S, k, -1) * weights_Sk[..., None].astype(x_SD.dtype), axis=1)


class MoE(nn.Module):
  """Mixture of experts (Mixtral, Jiang et al. 2024, arXiv:2401.04088), routed in float32.

  With `cfg.shared_d_ff`, one more expert that each token goes through, by a share of its own (Qwen1.5-MoE).
  """

  cfg: ModelConfig
  act: Any
  declare: Any  # (module, name, shape, axes, scale) -> the weight
  down_scale: float
  shared: Any  # () -> the feed-forward layer that all tokens go through
  rules: Rules | None = None
  ragged: bool = False  # how assignments travel where experts are on several devices

  @nn.compact
  def __call__(self, x_BTD: Array, real_BT: Array | None = None) -> tuple[Array, dict[str, Array]]:
    cfg, D, F, E = self.cfg, self.cfg.d_model, self.cfg.d_ff, self.cfg.n_experts
    x_SD = x_BTD.reshape(-1, D)
    router_DE = self.declare(self, 'router', (D, E), ('embed', None), 1.0)
    with jax.default_matmul_precision('highest'):  # accelerators round the factors of others
      logits_SE = linear(x_SD.astype(jnp.float32), router_DE)
    real_S = None if real_BT is None else real_BT.reshape(-1)
    experts_Sk, weights_Sk, aux = route(logits_SE, cfg.experts_per_token, cfg.normalize_experts, real_S)

    up = self.declare(self, 'up', (E, D, F), ('experts', 'expert_embed', 'mlp'), 1.0)
    gate = self.declare(self, 'gate', (E, D, F), ('experts', 'expert_embed', 'mlp'), 1.0) if cfg.gated_mlp else None
    down = self.declare(self, 'down', (E, F, D), ('experts', 'mlp', 'expert_embed'), self.down_scale)

    def mixed(tokens: Any, weights: Any) -> Array:
      x, experts, shares = (y.reshape(-1, y.shape[-1]) for y in tokens)
      partly = jax.tree.leaves(weights)[0].shape[0] < E
      exchange = Exchange(str((self.rules or {})['experts']), self.ragged) if partly else None
      return mix(x, experts, shares, weights, self.act, exchange).reshape(tokens[0].shape)

    routed = (x_BTD, *(y.reshape(*x_BTD.shape[:2], -1) for y in (experts_Sk, weights_Sk)))
    y_BTD = own_tokens(mixed, routed, (gate, up, down), self.rules, ('experts',))
    if cfg.shared_d_ff:
      gate_D1 = self.declare(self, 'shared_gate', (D, 1), ('embed', None), 1.0)
      y_BTD += jax.nn.sigmoid(linear(x_BTD, gate_D1)) * self.shared()(x_BTD)
    return y_BTD, aux
