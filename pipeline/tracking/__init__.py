"""From metrics.jsonl to MLflow: points, the follower process, MLflow's runs."""
