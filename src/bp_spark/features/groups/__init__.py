"""Groups of features: a module a group, each with a pure function ``features`` that returns its definitions in table order."""
