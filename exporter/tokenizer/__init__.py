"""A bundle's tokenizer: SentencePiece as it came, and the same in the form other clients read."""
