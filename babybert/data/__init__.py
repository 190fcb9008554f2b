"""From documents to batches: tokenizer, sentence pairs, masking, the table and its cache, the loaders."""
