"""Every option with its default and help, the checks across options, and the command line."""
