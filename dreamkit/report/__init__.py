"""Reporting: progress, records, figures and the HTML page."""
