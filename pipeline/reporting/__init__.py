"""The sections of a run's HTML report, and the plots, image grids and tables that other commands share with it."""
