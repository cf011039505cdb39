"""One file per pass; ``presets`` holds the one ordered list."""
