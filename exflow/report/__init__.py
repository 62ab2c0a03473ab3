"""The report: one HTML file that shows what a placement does, with nothing to load from elsewhere."""
