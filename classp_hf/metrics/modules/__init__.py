"""One file a metric, each loadable by its path with `evaluate.load`."""
