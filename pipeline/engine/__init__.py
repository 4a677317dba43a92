"""The machinery of the stages."""
