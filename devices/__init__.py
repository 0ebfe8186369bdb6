"""What a device can do: execution backends, memory readings, emulated links."""
