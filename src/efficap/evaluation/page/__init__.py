"""What eval.py leaves to look at: one page with the scores, the checks, the curves and the pictures of a split."""
