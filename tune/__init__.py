"""Scheduling: tasks x seeds as a Ray Tune sweep of Ray Train runs, tracked in MLflow, recorded in runs.parquet."""
