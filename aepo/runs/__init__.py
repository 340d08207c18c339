"""One run in its folder: the loop from data to result, its metrics, its evaluation, and stages kept for other runs."""
