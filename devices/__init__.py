"""What a device can do: execution backends and memory readings."""
