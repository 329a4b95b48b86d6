"""Five kills: in a write, at a rename, at an fsync, while preparing, at random; `kill_points.py` does them all."""

import pytest
from kill_points import run


@pytest.mark.slow
def test_five_kills(kill_points, tmp_path):
  assert run(tmp_path, kill_points, short=True, seed=0) == []
