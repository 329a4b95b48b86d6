"""GGUF files, llama.cpp's own: their names, config keys and layouts as Hugging Face has them.

llama.cpp's converter permutes the rows of Llama's q and k for its RoPE, adds 1 to Gemma's norms, stacks experts and
transposes GPT-2's matrices: all undone here. What a file says under the name of its architecture is translated or
refused by name, and so is a tensor that the architecture does not have, or lacks.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jaxlm.errors import InputError
from jaxlm.interop import gguf_tokenizer
from jaxlm.interop.foreign import Foreign, Tensor
from jaxlm.interop.gguf_config import ARCHITECTURES, Keys, tie
from jaxlm.interop.gguf_file import STORED, Entry, GGUFFile, open_container, shown

# Names in the file -> (names at Hugging Face, sizes in the file's order). V vocabulary, D width, Q and K heads times
# head size, N head size, F, M and S width of the MLP, of an expert and of the shared one, E experts, P positions, T
# three times D, R RoPE's.
Names = dict[str, tuple[str, str]]
TOP: Names = {
  'token_embd.weight': ('model.embed_tokens.weight', 'VD'),
  'output_norm.weight': ('model.norm.weight', 'D'),
}
HEAD: Names = {'output.weight': ('lm_head.weight', 'VD')}
ATTENTION: Names = {
  'attn_q.weight': ('self_attn.q_proj.weight', 'QD'),
  'attn_k.weight': ('self_attn.k_proj.weight', 'KD'),
  'attn_v.weight': ('self_attn.v_proj.weight', 'KD'),
  'attn_output.weight': ('self_attn.o_proj.weight', 'DQ'),
}
QKV_BIAS: Names = {
  'attn_q.bias': ('self_attn.q_proj.bias', 'Q'),
  'attn_k.bias': ('self_attn.k_proj.bias', 'K'),
  'attn_v.bias': ('self_attn.v_proj.bias', 'K'),
}
O_BIAS: Names = {'attn_output.bias': ('self_attn.o_proj.bias', 'D')}
MLP: Names = {
  'ffn_gate.weight': ('mlp.gate_proj.weight', 'FD'),
  'ffn_up.weight': ('mlp.up_proj.weight', 'FD'),
  'ffn_down.weight': ('mlp.down_proj.weight', 'DF'),
}
MLP_BIAS: Names = {
  'ffn_gate.bias': ('mlp.gate_proj.bias', 'F'),
  'ffn_up.bias': ('mlp.up_proj.bias', 'F'),
  'ffn_down.bias': ('mlp.down_proj.bias', 'D'),
}
PRE_NORMS: Names = {
  'attn_norm.weight': ('input_layernorm.weight', 'D'),
  'ffn_norm.weight': ('post_attention_layernorm.weight', 'D'),
}
HEAD_NORMS: Names = {
  'attn_q_norm.weight': ('self_attn.q_norm.weight', 'N'),
  'attn_k_norm.weight': ('self_attn.k_norm.weight', 'N'),
}
ALL_HEADS_NORMS: Names = {
  'attn_q_norm.weight': ('self_attn.q_norm.weight', 'Q'),
  'attn_k_norm.weight': ('self_attn.k_norm.weight', 'K'),
}
POST_NORMS: Names = {
  'post_attention_norm.weight': ('post_attention_layernorm.weight', 'D'),
  'post_ffw_norm.weight': ('post_feedforward_layernorm.weight', 'D'),
}
GEMMA_NORMS: Names = {
  'attn_norm.weight': ('input_layernorm.weight', 'D'),
  'ffn_norm.weight': ('pre_feedforward_layernorm.weight', 'D'),
  **POST_NORMS,
}
QWEN_EXPERTS: Names = {
  'ffn_gate_inp.weight': ('mlp.gate.weight', 'ED'),
  'ffn_gate_exps.weight': ('mlp.experts.{}.gate_proj.weight', 'EMD'),
  'ffn_up_exps.weight': ('mlp.experts.{}.up_proj.weight', 'EMD'),
  'ffn_down_exps.weight': ('mlp.experts.{}.down_proj.weight', 'EDM'),
}
SHARED_EXPERT: Names = {
  'ffn_gate_inp_shexp.weight': ('mlp.shared_expert_gate.weight', 'D'),
  'ffn_gate_shexp.weight': ('mlp.shared_expert.gate_proj.weight', 'SD'),
  'ffn_up_shexp.weight': ('mlp.shared_expert.up_proj.weight', 'SD'),
  'ffn_down_shexp.weight': ('mlp.shared_expert.down_proj.weight', 'DS'),
}
MIXTRAL_EXPERTS: Names = {
  'ffn_gate_inp.weight': ('block_sparse_moe.gate.weight', 'ED'),
  'ffn_gate_exps.weight': ('block_sparse_moe.experts.{}.w1.weight', 'EMD'),
  'ffn_up_exps.weight': ('block_sparse_moe.experts.{}.w3.weight', 'EMD'),
  'ffn_down_exps.weight': ('block_sparse_moe.experts.{}.w2.weight', 'EDM'),
}
GPT2_TOP: Names = {
  'token_embd.weight': ('transformer.wte.weight', 'VD'),
  'position_embd.weight': ('transformer.wpe.weight', 'PD'),
  'output_norm.weight': ('transformer.ln_f.weight', 'D'),
  'output_norm.bias': ('transformer.ln_f.bias', 'D'),
}
GPT2_LAYER: Names = {
  'attn_norm.weight': ('ln_1.weight', 'D'),
  'attn_norm.bias': ('ln_1.bias', 'D'),
  'attn_qkv.weight': ('attn.c_attn.weight', 'TD'),
  'attn_qkv.bias': ('attn.c_attn.bias', 'T'),
  'attn_output.weight': ('attn.c_proj.weight', 'DD'),
  'attn_output.bias': ('attn.c_proj.bias', 'D'),
  'ffn_norm.weight': ('ln_2.weight', 'D'),
  'ffn_norm.bias': ('ln_2.bias', 'D'),
  'ffn_up.weight': ('mlp.c_fc.weight', 'FD'),
  'ffn_up.bias': ('mlp.c_fc.bias', 'F'),
  'ffn_down.weight': ('mlp.c_proj.weight', 'DF'),
  'ffn_down.bias': ('mlp.c_proj.bias', 'D'),
}
LLAMAS = ('llama', 'mistral', 'mixtral')
LAYERS: dict[str, Names] = {
  'llama': PRE_NORMS | ATTENTION | MLP,
  'mistral': PRE_NORMS | ATTENTION | MLP,
  'mixtral': PRE_NORMS | ATTENTION | MIXTRAL_EXPERTS,
  'qwen2': PRE_NORMS | ATTENTION | QKV_BIAS | MLP,
  'qwen2_moe': PRE_NORMS | ATTENTION | QKV_BIAS | QWEN_EXPERTS | SHARED_EXPERT,
  'qwen3': PRE_NORMS | ATTENTION | HEAD_NORMS | MLP,
  'qwen3_moe': PRE_NORMS | ATTENTION | HEAD_NORMS | QWEN_EXPERTS,
  'gemma2': GEMMA_NORMS | ATTENTION | MLP,
  'gemma3_text': GEMMA_NORMS | ATTENTION | HEAD_NORMS | MLP,
  'olmo2': POST_NORMS | ATTENTION | ALL_HEADS_NORMS | MLP,
  'gpt2': GPT2_LAYER,
}


class Part(NamedTuple):
  """Where a tensor of Hugging Face's lies in the file, and what llama.cpp's converter did to it."""

  entry: Entry
  shape: tuple[int, ...]  # at Hugging Face
  first: int = 0  # row, where experts are stacked
  heads: int = 0  # whose rows are permuted
  shift: int = 0  # what was added
  transposed: bool = False


def open_file(path: epath.PathLike) -> Foreign:
  """Opens a GGUF file; nothing but its header is read. Raises InputError on one that is damaged or not supported."""
  file = open_container(path)
  where = str(file.path)
  keys = Keys(where, file.metadata)
  name = keys.general()
  config, sizes = ARCHITECTURES[name](keys, file)
  config = {**config, **tie(file), **keys.token_ids()}
  keys.finish()
  parts = dict(_parts(file, config, sizes))
  tokenizer = gguf_tokenizer.build(where, file.metadata, name)
  if tokenizer and tokenizer.vocab_size > config['vocab_size']:
    tokens, rows = tokenizer.vocab_size, config['vocab_size']
    raise InputError(f'{where}: {tokens} tokens for an embedding of {rows} rows; convert the model again')
  template = file.metadata.get('tokenizer.chat_template')
  return Foreign(
    where=where,
    config=config,
    shapes={name: part.shape for name, part in parts.items()},
    read=_reader(file._replace(metadata={}), parts),  # the texts of a vocabulary are not kept
    tokenizer=tokenizer,
    chat_template=template if isinstance(template, str) else None,
    generation=keys.generation(),
  )


def _reader(file: GGUFFile, parts: dict[str, Part]) -> Callable[[str], Tensor]:
  def read(name: str) -> Tensor:
    part = parts[name]
    dtype = np.dtype(np.float32) if part.shift else STORED.get(part.entry.kind, np.dtype(np.float32))
    return Tensor(part.shape, dtype, lambda start, stop: _rows(file, part, start, stop), axis=int(part.transposed))

  return read


def _rows(file: GGUFFile, part: Part, start: int, stop: int) -> np.ndarray:
  """Rows start ... stop as Hugging Face has them, columns where the matrix is transposed."""
  entry, shape, first, heads, shift, transposed = part
  stored = shape[::-1] if transposed else shape
  size = stored[0] // (heads or 1)  # a permuted head is read whole
  low, high = (start // size * size, -(-stop // size) * size) if heads else (start, stop)
  if len(stored) == 1:  # its one row is the vector
    out = file.read_rows(entry, 0, 1)[0][low:high]
  else:
    out = file.read_rows(entry, first + low, high - low)
  if heads:
    out = out.reshape(-1, size // 2, 2, *out.shape[1:]).swapaxes(1, 2).reshape(out.shape)[start - low : stop - low]
  if shift:
    out = out.astype(np.float32) - np.float32(shift)
  return out.T if transposed else out


def _parts(file: GGUFFile, config: dict[str, Any], sizes: dict[str, int]) -> Iterator[tuple[str, Part]]:
  """Every tensor by its name at Hugging Face. Raises InputError on a missing, unknown or misshapen one."""
  where, left = str(file.path), dict(file.tensors)
  for name, (theirs, letters) in _names(file, config):
    entry = left.pop(name, None)
    if entry is None:
      raise InputError(f'{where}: tensor {shown(name)} is missing; convert the model again')
    shape = tuple(sizes[letter] for letter in letters)
    if entry.shape != shape and (len(shape) != 1 or entry.shape != (1, *shape)):  # a row may be a matrix of one
      raise InputError(f'{where}: tensor {shown(name)} has shape {entry.shape}, not {shape}; convert the model again')
    yield from _changes(theirs, Part(entry, shape), config)
  if config['model_type'] in LLAMAS:
    left.pop('rope_freqs.weight', None)  # is in config['rope_scaling']
  if left:
    more = f' and {len(left) - 1} more' if len(left) > 1 else ''
    kind = config['model_type']
    raise InputError(f'{where}: tensor {shown(min(left))}{more} is none of {kind}; this kind of model is not supported')


def _names(file: GGUFFile, config: dict[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
  kind = config['model_type']
  top, inside = (GPT2_TOP, 'transformer.h') if kind == 'gpt2' else (TOP, 'model.layers')
  yield from (top if config['tie_word_embeddings'] else top | HEAD).items()
  biases: Names = QKV_BIAS | O_BIAS if config.get('attention_bias') else {}
  layer = LAYERS[kind] | biases | (MLP_BIAS if config.get('mlp_bias') else {})
  for i in range(config.get('num_hidden_layers', config.get('n_layer', 0))):
    for name, (theirs, letters) in layer.items():
      yield f'blk.{i}.{name}', (f'{inside}.{i}.{theirs}', letters)


def _changes(theirs: str, part: Part, config: dict[str, Any]) -> Iterator[tuple[str, Part]]:
  """The tensor or, of stacked experts, the tensors, with what is to be undone."""
  kind = config['model_type']
  if '{}' in theirs:
    rows, shape = part.shape[1], part.shape[1:]
    yield from ((theirs.format(e), part._replace(shape=shape, first=e * rows)) for e in range(part.shape[0]))
    return
  if kind in LLAMAS and (found := re.search(r'\.([qk])_proj\.', theirs)):
    part = part._replace(heads=config['num_attention_heads' if found[1] == 'q' else 'num_key_value_heads'])
  if kind in ('gemma2', 'gemma3_text') and theirs.endswith('norm.weight'):
    part = part._replace(shift=1)
  if theirs.endswith('shared_expert_gate.weight'):
    part = part._replace(shape=(1, *part.shape))
  if kind == 'gpt2' and re.search(r'\.c_\w+\.weight$', theirs):
    part = part._replace(shape=part.shape[::-1], transposed=True)
  yield theirs, part
