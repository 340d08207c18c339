"""Tables, figures and pages from runs.parquet, search.json or MLflow; without torch and Ray."""
