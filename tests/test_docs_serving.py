"""docs/serving.md: its Python is run, against a small model in the place of the one that it names."""

import pytest

for needed in ('openai', 'starlette', 'uvicorn'):
  pytest.importorskip(needed, reason="pip install -e '.[dev,serve]'")

from pages import blocks  # noqa: E402
from served import Server, model  # noqa: E402

from jaxlm import interop  # noqa: E402


def test_the_client_of_its_page_is_answered(tmp_path, capsys):
  interop.export(model(), tmp_path / 'model')
  server = Server(tmp_path / 'model', tmp_path, '--name', 'smol', '--slots', '2', '--context', '256')
  (block,) = (block for block in blocks('docs/serving.md') if block.language == 'python')
  assert block.text.count('http://127.0.0.1:8000/v1') == 1
  names = {}
  exec(block.text.replace('http://127.0.0.1:8000/v1', server.url), names)
  names['client'].close()
  assert capsys.readouterr().out and server.stop() == 0
