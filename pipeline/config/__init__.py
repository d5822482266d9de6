"""Every option, its validation, and the command line."""
