"""Conversion of whole models to modules that keep less for backward: `pyzo.convert`, `pyzo.revert`, `pyzo.plan`."""

from .converter import convert, plan, revert
from .report import Entry, Report

__all__ = ["Entry", "Report", "convert", "plan", "revert"]
