"""Delta tables: their declarations, the store that reads and writes them, and the record of what ran."""
