"""The shard: owns the device and decides nothing."""
