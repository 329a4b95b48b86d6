"""A headless Chromium, driven by the DevTools protocol: real clicks, real keys, what it asked the network for."""

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from websockets.sync import client

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
KEYS = {'Enter': (13, '\r'), 'Escape': (27, ''), 'ArrowRight': (39, ''), '0': (48, '0'), '1': (49, '1'), '2': (50, '2')}


class Browser:
  """A process of it with one page open, which reaches this machine alone."""

  def __init__(self, home: Path):
    home.mkdir(parents=True, exist_ok=True)
    command = [CHROMIUM, '--headless=new', '--remote-debugging-port=0', f'--user-data-dir={home}', '--no-first-run']
    command += ['--disable-gpu', '--disable-dev-shm-usage', '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1']
    command += ['--no-sandbox'] if os.geteuid() == 0 else []  # which it does not have for root
    self._number, self._session, self.events = itertools.count(1), None, []
    with contextlib.ExitStack() as stack, (home / 'log').open('w') as log:
      process = stack.enter_context(subprocess.Popen([*command, 'about:blank'], stdout=log, stderr=log))
      stack.callback(process.terminate)
      where, deadline = home / 'DevToolsActivePort', time.monotonic() + 60
      while not where.exists() or len(where.read_text().split()) < 2:
        assert time.monotonic() < deadline and process.poll() is None, (home / 'log').read_text()
        time.sleep(0.05)
      port, path = where.read_text().split()
      self._socket = stack.enter_context(client.connect(f'ws://127.0.0.1:{port}{path}', max_size=None))
      target = self.send('Target.createTarget', url='about:blank')['targetId']
      self._session = self.send('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
      for domain in ('Page', 'Network', 'Runtime', 'Log'):
        self.send(f'{domain}.enable')
      self.close = stack.pop_all().close

  def send(self, method: str, **params: Any) -> dict[str, Any]:
    """A command's result; events that come before it are kept."""
    number = next(self._number)
    session = {'sessionId': self._session} if self._session else {}
    self._socket.send(json.dumps({'id': number, 'method': method, 'params': params, **session}))
    while True:
      told = json.loads(self._socket.recv(timeout=120))
      if told.get('id') == number:
        assert 'error' not in told, (method, told['error'])
        return told['result']
      self.events.append(told)

  def run(self, script: str) -> Any:
    """The value of an expression in the page."""
    found = self.send('Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True)
    assert 'exceptionDetails' not in found, found['exceptionDetails']
    return found['result'].get('value')

  def until(self, script: str, seconds: float = 120) -> None:
    """Waits for an expression to be true."""
    deadline = time.monotonic() + seconds
    while not self.run(f'Boolean({script})'):
      assert time.monotonic() < deadline, (script, self.run('document.body?.innerText'))
      time.sleep(0.05)

  def open(self, url: str, ready: str = 'document.readyState === "complete"') -> None:
    self.send('Page.navigate', url=url)
    self.until(f'location.href.startsWith({json.dumps(url)}) && {ready}')

  def place(self, selector: str, number: int = 0) -> tuple[float, float]:
    """The middle of an element, which is scrolled to; it has to be the one that is seen there."""
    script = f"""(() => {{
      const found = document.querySelectorAll({json.dumps(selector)})[{number}]
      if (!found) return 'there is none'
      found.scrollIntoView({{block: 'nearest'}})
      const box = found.getClientRects()[0], x = box.x + box.width / 2, y = box.y + box.height / 2
      const seen = document.elementFromPoint(x, y)
      return found.contains(seen) ? [x, y] : 'behind ' + seen?.outerHTML.slice(0, 99)
    }})()"""
    found = self.run(script)
    assert isinstance(found, list), f'{selector}: {found}'
    return found[0], found[1]

  def move(self, selector: str, number: int = 0) -> None:
    x, y = self.place(selector, number)
    self.send('Input.dispatchMouseEvent', type='mouseMoved', x=x, y=y)

  def click(self, selector: str, number: int = 0) -> None:
    x, y = self.place(selector, number)
    for kind in ('mousePressed', 'mouseReleased'):
      self.send('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', clickCount=1)

  def tap(self, selector: str, number: int = 0) -> None:
    """With a finger."""
    x, y = self.place(selector, number)
    self.send('Input.dispatchTouchEvent', type='touchStart', touchPoints=[{'x': x, 'y': y}])
    self.send('Input.dispatchTouchEvent', type='touchEnd', touchPoints=[])

  def write(self, text: str) -> None:
    """Where the cursor is."""
    self.send('Input.insertText', text=text)

  def press(self, key: str, shift: bool = False) -> None:
    code, text = KEYS[key]
    how = {'key': key, 'windowsVirtualKeyCode': code, 'modifiers': 8 if shift else 0}
    self.send('Input.dispatchKeyEvent', type='keyDown', **how, **({'text': text} if text else {}))
    self.send('Input.dispatchKeyEvent', type='keyUp', **how)

  def fill(self, selector: str, text: str) -> None:
    """Instead of what stands there."""
    self.click(selector)
    self.run(f'document.querySelector({json.dumps(selector)}).select()')
    self.write(text)

  def look(self, width: int, height: int, dark: bool = False, phone: bool = False) -> None:
    """How large and how bright the page is shown."""
    scale = {'deviceScaleFactor': 1, 'mobile': phone}
    self.send('Emulation.setDeviceMetricsOverride', width=width, height=height, **scale)
    scheme = {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}
    self.send('Emulation.setEmulatedMedia', features=[scheme])

  def picture(self) -> bytes:
    """PNG."""
    return base64.b64decode(self.send('Page.captureScreenshot', format='png')['data'])

  def asked(self) -> list[str]:
    """The addresses that were asked for so far."""
    self.run('1')
    found = (e['params']['request']['url'] for e in self.events if e.get('method') == 'Network.requestWillBeSent')
    return [url for url in found if url != 'about:blank']

  def complaints(self) -> list[str]:
    """What it wrote to its console: errors of scripts, what a policy forbade."""
    self.run('1')
    logged = [e['params']['entry'] for e in self.events if e.get('method') == 'Log.entryAdded']
    thrown = [str(e['params']) for e in self.events if e.get('method') == 'Runtime.exceptionThrown']
    return [f'{e["text"]} {e.get("url", "")}' for e in logged if e['level'] != 'verbose'] + thrown
