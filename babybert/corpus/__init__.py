"""Raw text to documents: the generated demo, IMDB, and readers of text, CSV, JSON Lines and Parquet files."""
