"""What `pipeline check` looks for in a dataset."""
