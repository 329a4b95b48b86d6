"""A Google Cloud Storage emulator that also knows the one condition that locks need: `python gcs_emulator.py PORT`."""

import sys
import time
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import objects

insert = objects.insert


def conditional_insert(request, response, storage, *args, **kwargs):
  """An upload that asks for generation 0 is refused where the object exists (the emulator itself ignores that)."""
  if request.query.get('ifGenerationMatch') == ['0']:
    name = request.query.get('name', [None])[0] or request.data['meta']['name']
    if name in storage.objects.get(request.params['bucket_name'], {}):
      response.status = HTTPStatus.PRECONDITION_FAILED
      response.json({'error': {'code': 412, 'message': 'conditionNotMet'}})
      return None
  return insert(request, response, storage, *args, **kwargs)


if __name__ == '__main__':
  for _, handlers in server.HANDLERS:
    handlers.update({method: conditional_insert for method, handler in handlers.items() if handler is insert})
  server.create_server('localhost', int(sys.argv[1]), in_memory=True, default_bucket='bucket').start()
  while True:
    time.sleep(1)
