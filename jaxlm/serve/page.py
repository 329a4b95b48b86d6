"""The web page: one file, and the headers that let it do nothing but talk to its own server."""

import base64
import hashlib
import importlib.resources
import re
from functools import cache


@cache
def page() -> tuple[bytes, dict[str, str]]:
  """The page in UTF-8 and its headers: the scripts and styles in it are named by their digests, and no others run."""
  text = (importlib.resources.files('jaxlm') / 'assets' / 'page.html').read_text('utf-8')
  digests = lambda tag: ' '.join(map(_digest, re.findall(f'<{tag}>(.*?)</{tag}>', text, re.DOTALL)))
  policy = {
    'default-src': "'none'",
    'script-src': digests('script'),
    'style-src': digests('style'),
    'connect-src': "'self'",
    'img-src': 'data:',
    'base-uri': "'none'",
    'form-action': "'none'",
    'frame-ancestors': "'none'",
    'require-trusted-types-for': "'script'",
  }
  headers = {
    'Content-Type': 'text/html; charset=utf-8',
    'Content-Security-Policy': '; '.join(' '.join(pair) for pair in policy.items()),
    'Cross-Origin-Opener-Policy': 'same-origin',
    'Cross-Origin-Resource-Policy': 'same-origin',
    'Referrer-Policy': 'no-referrer',
    'X-Content-Type-Options': 'nosniff',
    'Cache-Control': 'no-cache',
  }
  return text.encode(), headers


def _digest(text: str) -> str:
  return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
