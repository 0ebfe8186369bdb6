"""What a device can do: profiles, the probe that writes them, memory and its limits, backends, emulated links."""
