"""Runs beside each other: scores, whether their differences are chance, curves, and where the captions differ."""
