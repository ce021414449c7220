"""Saved results to tables and figures."""
