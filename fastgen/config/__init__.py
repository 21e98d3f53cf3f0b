"""Settings: every section with its help text, YAML and flags merged, mistakes reported in one line."""
