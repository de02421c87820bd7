"""Users erased, keys rotated, old rows deleted, and the proof that no file still holds what was erased."""
