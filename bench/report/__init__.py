"""Turning saved results into tables and figures."""
