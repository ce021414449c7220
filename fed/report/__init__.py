"""Finished files to tables, figures and pages; nothing that trains imports it."""
