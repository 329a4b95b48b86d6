"""What docs/pods.md says to paste: YAML that parses and adds up, scripts that a shell accepts, flags that exist."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from jaxlm import cli, peers
from jaxlm.config import Watch
from jaxlm.errors import Stopped

PAGE = (Path(__file__).parents[1] / 'docs' / 'pods.md').read_text()
BLOCKS = re.findall(r'```(\w+)\n(.*?)```', PAGE, re.DOTALL)
SETS = [yaml.safe_load(text) for language, text in BLOCKS if language == 'yaml']
SCRIPTS = [text for language, text in BLOCKS if language == 'bash']


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda text: text.splitlines()[0][:20])
def test_a_shell_accepts_the_scripts(script):
  done = subprocess.run(['bash', '-n'], input=script, capture_output=True, text=True)
  assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_job_sets_add_up():
  assert len(SETS) == 2
  for one in SETS:
    assert (one['apiVersion'], one['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
    (group,) = one['spec']['replicatedJobs']
    job = group['template']['spec']
    pod = job['template']['spec']
    (container,) = pod['containers']
    assert job['parallelism'] == job['completions'] and job['backoffLimit'] == 0
    assert pod['restartPolicy'] == 'Never' and pod['terminationGracePeriodSeconds'] > 100
    assert container['command'][:4] == ['python', '-m', 'jaxlm', 'pretrain']
  slice_, gpus = (one['spec']['replicatedJobs'][0]['template']['spec'] for one in SETS)
  rows, columns = map(int, slice_['template']['spec']['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x'))
  per_host = slice_['template']['spec']['containers'][0]['resources']['limits']['google.com/tpu']
  assert rows * columns == slice_['parallelism'] * per_host == 256
  (rule,) = slice_['podFailurePolicy']['rules']
  assert rule['onExitCodes']['containerName'] == slice_['template']['spec']['containers'][0]['name']
  env = {one['name']: one['value'] for one in gpus['template']['spec']['containers'][0]['env']}
  names = SETS[1]['metadata']['name'], SETS[1]['spec']['replicatedJobs'][0]['name']
  assert env['JAX_NUM_PROCESSES'] == str(gpus['parallelism'])
  assert env['JAX_COORDINATOR_ADDRESS'] == f'{names[0]}-{names[1]}-0-0.{names[0]}:8476'


def test_the_commands_are_ones_that_jaxlm_takes():
  found = re.findall(r'jaxlm pretrain (\S+\.py[^"\n]*)', PAGE.replace('\\\n', ' '))
  jobs = [one['spec']['replicatedJobs'][0]['template']['spec']['template']['spec'] for one in SETS]
  commands = [*map(shlex.split, found), *(job['containers'][0]['command'][4:] for job in jobs)]
  assert len(commands) >= 5
  for config, *flags in commands:
    if config == 'MY_CONFIG.py':
      config = 'configs/pretrain/small.py'
    cli.pretraining([str(Path(__file__).parents[1] / config), *flags, '--mesh.data=2'])


def test_the_codes_and_seconds_are_those_of_the_code():
  assert f'leave with {Stopped.code} (130 for ctrl-c)' in PAGE and f'leave with {peers.CODE}' in PAGE
  assert f'no sign of life for {peers.DEAD:.0f} s' in PAGE
  assert f'({Watch().step_timeout:.0f} s) behind' in PAGE and peers.SLOW == 10
