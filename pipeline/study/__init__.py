"""A study as a whole: declared in one file, checked, costed, run from teacher to report, and resumed."""
