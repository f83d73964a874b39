"""The admin API, health and metrics of one node."""
