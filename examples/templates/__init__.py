"""Command lines to start a project of your own from, one for each task."""
