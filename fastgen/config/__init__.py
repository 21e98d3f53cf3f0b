"""Settings: every section with its help text, YAML and flags merged, mistakes told in one line."""
