"""Measurements of pyzo: cases, recorded rows and pictures drawn from them."""
