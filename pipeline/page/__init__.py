"""report.html: what a study found, as one self-contained page with its charts."""
