"""Runs as self-contained HTML pages: one run, or several beside each other."""

from jaxlm.report.compare import write as compare
from jaxlm.report.page import gained, write

__all__ = ['compare', 'gained', 'write']
