"""Package definition. Tool settings live in pyproject.toml; everything pip needs is here."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
  'tpu': ['jax[tpu]'],
  'cuda': ['jax[cuda13]'],
  'hub': ['huggingface_hub>=2.4'],
  'dedup': ['datasketch>=2.0'],
  'gcs': ['gcsfs>=2026.1'],
  'beam': ['apache-beam>=2.77'],  # apart from dev and parity: it wants an older protobuf
  'serve': [],  # empty ones are filled when what needs them is there
  'eval': ['rouge-score>=0.1.2', 'sacrebleu>=2.6'],
  'lm-eval': ['lm-eval>=0.4.13'],
  'quant': ['qwix>=0.1.8'],
  'trackio': ['trackio>=0.40'],
  'wandb': ['wandb>=0.25'],
  'rl': ['reasoning-gym>=0.1.25', 'math-verify>=0.9'],
  'parity': ['torch==2.13.0', 'transformers>=5.0', 'peft>=0.17', 'trl>=1.16', 'lm-eval>=0.4.13'],
  'dev': [
    'pytest>=8',
    'pytest-xdist>=3.6',
    'hypothesis>=6',
    'chex>=0.1.92',
    'ruff>=0.17',
    'ty>=0.0.105',
    'nbmake>=1.5',
    'jupytext>=1.16',
    'ipykernel>=6',
    'beartype>=0.19',
    'datasketch>=2.0',
    'huggingface_hub>=2.4',
    'gcsfs>=2026.1',
    'gcp-storage-emulator>=2026.7',
    'qwix>=0.1.8',
    'rouge-score>=0.1.2',
    'sacrebleu>=2.6',
    'reasoning-gym>=0.1.25',
    'math-verify>=0.9',
  ],
}

setup(
  name='jaxlm',
  version='0.1.0',
  description='From raw text to an aligned, served language model: pure functions on JAX, on a laptop or a pod.',
  long_description=Path('README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=find_packages(include=['jaxlm', 'jaxlm.*']),
  package_data={'jaxlm': ['assets/**/*']},
  install_requires=[
    'jax>=0.10.2',
    'flax>=0.12.8',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8,<0.13',
    'chex>=0.1.92',
    'tensorflow-datasets>=4.9.10',
    'array-record>=0.8.6',
    'gguf>=0.19',
    'google-crc32c>=1.9',
    'importlib_resources>=6',  # tensorflow-datasets needs it to download and does not say so
    'grain>=0.2.18',
    'tokenizers>=0.23',
    'safetensors>=0.5',
    'etils[epath]>=1.12',
    'jaxtyping>=0.3.11',
    'matplotlib>=3.9',
    'numpy>=2.0',
    'jinja2>=3.1',
    'pyarrow>=15',
    'rich>=13',
    'tensorboardX>=2.6',
    'tyro>=1.0.16',
  ],
  extras_require=EXTRAS,
  entry_points={'console_scripts': ['jaxlm = jaxlm.cli:main']},
)
