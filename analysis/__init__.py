"""Tables and figures from runs.parquet; knows neither torch nor Ray nor MLflow."""
