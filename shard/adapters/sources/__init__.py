"""Where adapters come from: a directory, the hub, S3."""
