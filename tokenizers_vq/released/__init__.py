"""Networks of the released tokenizers under their published parameter names."""
