"""Raw deliveries -> events: sources, pseudonyms, cleaning, texts."""
