"""Send what training writes (metrics.jsonl, summaries, files) to MLflow, from a process of its own."""
