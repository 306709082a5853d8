"""One module for each command of the command line that is not a run of its own."""
