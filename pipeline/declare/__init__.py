"""A new study: its texts checked, its records shown, its file written from a few answers."""
