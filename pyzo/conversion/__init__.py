"""Conversion of whole models to modules that keep less for backward: `pyzo.convert`, `pyzo.revert`, `pyzo.plan`."""

from .converter import convert, plan, revert
from .recipes import CHOICES, RECIPES
from .report import Entry, Report

__all__ = ["CHOICES", "RECIPES", "Entry", "Report", "convert", "plan", "revert"]
