"""Raw text to documents: the demo, IMDB, and readers of text, CSV, JSON Lines and Parquet files."""
