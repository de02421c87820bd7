"""Members, the stack that joins them, and what explains their predictions."""
