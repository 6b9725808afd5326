"""``python -m efficap.data.doctor PATH``: what is wrong with a data set, before training finds out."""
