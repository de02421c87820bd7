"""Train the members, stack them, and promote what is better."""
