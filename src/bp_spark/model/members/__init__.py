"""The members of a bundle: fitted models of a user's spend."""
