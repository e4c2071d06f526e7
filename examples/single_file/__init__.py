"""Files to copy: each is one script, plain Lightning, no command line."""
