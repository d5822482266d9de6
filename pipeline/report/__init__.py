"""Run folders in, a readable result out: tables, Markdown, Parquet and the page report.html."""
