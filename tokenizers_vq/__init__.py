"""Values to discrete tokens and back: learned VQ tokenizers, WordPiece text, sequences."""
