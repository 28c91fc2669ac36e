"""A campaign's results for readers: table, page, figures, significance."""
