"""What the report of a run shows, and the pictures and tables that other commands share with it."""
