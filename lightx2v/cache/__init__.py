"""Feature caches: steps whose blocks are not run, because the last result is near enough."""
