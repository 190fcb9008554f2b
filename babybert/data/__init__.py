"""From documents to batches: corpus, tokenizer, sentence pairs, masking, the CSV table, the loader."""
