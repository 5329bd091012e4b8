"""What the experiments share: data split by string, networks, methods, the search on validation, measures, reports."""
