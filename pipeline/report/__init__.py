"""The report: finished runs become the figures of a study, in the terminal, as Markdown, as tables and as a page."""
